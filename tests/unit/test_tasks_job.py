"""One run per workspace, its parameters on disk before it starts, and no service left or wrongly ended."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from research_rl import config
from research_rl.errors import ConfigError, DataError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.lock import locked
from research_rl.pipeline.stages import Workspace
from tasks import settings
from tasks.job import _leaves, opened, reap_all, resolve, stop_services
from tests.waiting import ended, until

HOLD = "import sys; from pathlib import Path; from research_rl.pipeline.stages import Workspace\n"
HOLD += "from research_rl.pipeline.lock import locked\n"
HOLD += "with locked(Workspace(Path(sys.argv[1])), 0, 'a test'):\n    print('held', flush=True); sys.stdin.read()"
SPAWN = "import sys; from pathlib import Path; from research_rl.process.services import spawn\n"
SPAWN += (
    "for folder in sys.argv[1:]:\n    print(spawn('sleeper', ['sleep', '60'], folder=Path(folder)).popen.pid, flush=True)\nsys.stdin.read()"
)


def test_a_flow_starts_without_libraries_that_it_may_not_need() -> None:
    """Each takes seconds of every run: pandas, which pyarrow brings with its first scalar, and a grammar that jsonschema builds."""
    found = subprocess.run(
        [sys.executable, "-c", "import flows.train, sys; print(*sys.modules)"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    large = {"pandas", "scipy", "sklearn", "torch", "faiss", "mlflow", "great_expectations", "matplotlib", "lark"}
    assert large & {*found.stdout.split()} == set()


@pytest.fixture
def holder(tmp_path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process that holds the workspace."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_profile_wins_over_params_yaml_and_overrides_over_both(tmp_path: Path) -> None:
    config.save(config.load_profile("laptop", ["train.steps=7"]), tmp_path / "params.yaml")
    assert resolve(tmp_path, None, {}).train.steps == 7
    assert resolve(tmp_path, None, {"train.steps": 9}).train.steps == 9
    assert resolve(tmp_path, "laptop", {}).train.steps != 7
    assert resolve(tmp_path / "new", None, {}).profile == "laptop"


@pytest.mark.parametrize("value", ["a: b", None, [1, "two"], {"x": "it's"}, 1e-6, True])
def test_an_override_keeps_its_value(value: object, tmp_path: Path) -> None:
    assert resolve(tmp_path, "laptop", {"train.extra": {"key": value}}).train.extra == {"key": value}


def test_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        resolve(tmp_path, "laptop", {"train.stepz": 1})


def test_a_second_run_is_refused_by_name_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ServiceError, match=rf"in use by process {holder.pid} \(a test\)"), locked(Workspace(tmp_path), 0.0):
        pass


def test_a_killed_holder_frees_the_workspace(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    with locked(Workspace(tmp_path), 5.0):
        pass


@contextmanager
def spawned(*folders: Path) -> Generator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Another process that started a service in each folder, and those services (below their guardians)."""
    owner = subprocess.Popen([sys.executable, "-c", SPAWN, *map(str, folders)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    guardians = [psutil.Process(int(owner.stdout.readline())) for _ in folders]
    assert all(until(guardian.children) for guardian in guardians)
    services = [child for guardian in guardians for child in guardian.children()]
    try:
        yield owner, services
    finally:
        for process in (owner, *guardians, *services):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        owner.wait()


def crash(owner: subprocess.Popen[str], services: list[psutil.Process]) -> None:
    """Kill an owner and the guardians of its services at one moment, as the out-of-memory killer does: the services run on."""
    for service in services:
        service.parent().kill()  # type: ignore[union-attr]
    owner.kill()
    owner.wait()


def test_services_whose_owner_crashed_are_ended_and_those_of_make_up_are_not(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    folders = [space.services / name for name in (".", "train", settings.stack_folder().name)]
    with spawned(*folders) as (owner, services):
        crash(owner, services)
        assert reap_all(space) == ["sleeper", "sleeper"]
        assert until(lambda: all(ended(service.pid) for service in services[:2]))
        assert services[2].is_running()


def test_the_hook_leaves_a_workspace_in_use_alone(tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.job._LOCK_WAIT_S", 0.3)
    run = SimpleNamespace(parameters={"workspace": str(tmp_path)}, name="a-run")
    with spawned(Workspace(tmp_path).services) as (owner, (service,)):
        crash(owner, [service])
        stop_services(None, run, None)
        assert service.is_running(), "the holder may use it"
        holder.kill()
        holder.wait()
        stop_services(None, run, None)
        assert until(lambda: ended(service.pid))


def research(tmp_path: Path, stage: str) -> subprocess.Popen[str]:
    """Start `research run`, as `dvc repro` does."""
    command = [sys.executable, "-m", "research_rl", "run", stage, "-w", str(tmp_path), "data.generated.entities=120"]
    command += ["data.generated.train_questions=16", "data.generated.test_questions=8"]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_flow_does_not_enter_a_workspace_in_which_research_run_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace(tmp_path)
    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")
    space.work("locks").mkdir(parents=True)
    with (space.work("locks") / "download").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the stage waits for this, so that the command is at work as long as the test needs it
        running = research(tmp_path, "download")
        assert running.stderr and "waiting for the process that builds download" in running.stderr.readline()
        message = rf"in use by process {running.pid} \(research run download\); wait for it or use another workspace"
        with pytest.raises(ServiceError, match=message), opened(str(tmp_path), None, {}, flow="research-train", run_id="0"):
            pass
    assert running.wait(60) == 0


def test_research_run_waits_for_the_holder_and_says_who_it_is(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")
    waiting = research(tmp_path, "download")
    assert waiting.stderr and waiting.stderr.readline() == f"waiting for process {holder.pid} (a test), which uses this workspace\n"
    assert waiting.poll() is None and not Workspace(tmp_path).folder("download").exists()
    holder.kill()
    assert waiting.wait(60) == 0 and Workspace(tmp_path).folder("download").exists()


def test_only_services_and_connections_are_tried_again() -> None:
    from tasks.stage import is_transient

    def judge(error: Exception) -> bool:
        return is_transient(None, None, SimpleNamespace(result=lambda raise_on_failure: error))  # type: ignore[arg-type]

    assert [judge(error) for error in (ServiceError("x"), ConnectionResetError(), TimeoutError())] == [True] * 3
    assert [judge(error) for error in (ConfigError("x"), DataError("x"), KeyError("x"))] == [False] * 3


def test_settings_of_the_caller_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "mine")
    settings.apply(tmp_path)
    assert os.environ["DO_NOT_TRACK"] == "mine" and os.environ["PREFECT_HOME"] == str(tmp_path / ".prefect")


EVALUATION = ("baseline", "evaluate", "report")


def test_an_evaluation_takes_no_parameter_that_decides_what_it_does_not_build(tmp_path: Path) -> None:
    """research-eval with train.lr wrote it to params.yaml: the training, and all that was made from it, counted as stale."""
    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")
    before = (tmp_path / "params.yaml").read_bytes()
    for overrides, says in (
        ({"train.lr": 0.5}, r"train.lr 0.0001 -> 0.5: this flow builds baseline, evaluate, report and would leave train stale"),
        ({"seed": 7}, "would leave download, prepare, policy, train stale"),
    ):
        with pytest.raises(ConfigError, match=says), opened(str(tmp_path), None, overrides, flow="f", run_id="r" * 36, only=EVALUATION):
            pass
        assert (tmp_path / "params.yaml").read_bytes() == before
    _leaves(resolve(tmp_path, None, {"evaluation.rows": 8, "train.lr": 1e-4}), Workspace(tmp_path), EVALUATION)
