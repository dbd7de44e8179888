"""One run per workspace, its parameters on disk before it starts, and no service left or wrongly ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from research_rl import config
from research_rl.errors import ConfigError, DataError, ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import spawn
from tasks import settings
from tasks.job import locked, reap_all, resolve, stop_services

HOLD = "import sys; from pathlib import Path; from research_rl.pipeline.stages import Workspace; from tasks.job import locked\n"
HOLD += "with locked(Workspace(Path(sys.argv[1])), 0):\n    print('held', flush=True); sys.stdin.read()"


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
    with pytest.raises(ServiceError, match=f"in use by process {holder.pid}"), locked(Workspace(tmp_path), 0.0):
        pass


def test_a_killed_holder_frees_the_workspace(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    with locked(Workspace(tmp_path), 5.0):
        pass


def sleeper(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process whose owner is gone, as a killed run leaves it."""
    return spawn("sleeper", ["sleep", "60"], folder=folder, detached=True).popen


def test_services_of_a_workspace_are_ended_and_those_of_make_up_are_not(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    own, nested, stack = (sleeper(space.services / name) for name in (".", "train", settings.stack_folder().name))
    try:
        assert reap_all(space) == ["sleeper", "sleeper"]
        assert own.wait(5) is not None and nested.wait(5) is not None
        assert stack.poll() is None
    finally:
        stack.terminate()
        stack.wait()


def test_the_hook_leaves_a_workspace_in_use_alone(tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.job._LOCK_WAIT_S", 0.3)
    process = sleeper(Workspace(tmp_path).services)
    run = SimpleNamespace(parameters={"workspace": str(tmp_path)}, name="a-run")
    stop_services(None, run, None)
    assert process.poll() is None
    holder.kill()
    holder.wait()
    stop_services(None, run, None)
    assert process.wait(5) is not None


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
