"""A training under infra/compose.yaml while each of its servers, its worker and its machine is lost: it goes on, and nothing is missing.

One flow run takes all faults, one after the other, so that each test begins where the last one left it; it is cancelled in the end.
`faults.json` in the engine's folder has a line for each: its name, the step before it, and the seconds until the next steps stood on
disk and were in MLflow.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from research_rl.pipeline.stages import Workspace
from research_rl.training.run.metrics_log import MetricsLog
from tests.infra.composed import ENDED, PREFECT, SERVERS, Client, Composed
from tests.infra.conftest import Bench, brought_up
from tests.infra.engine import check
from tests.training import SMALLEST
from tests.waiting import until

pytestmark = [pytest.mark.infra, pytest.mark.timeout(7200)]
STEPS = 3000
"""More than the faults take on any machine; the run is cancelled after them."""
DISK_MIB = 4096
REST = 64 << 20
"""Bytes of it that are filled by writing."""
AWAY_S = 60
LEASE_S = 240
"""Longer than the 225 s after which a run's lease of its deployment's limit is renewed."""
NO_RULE_STOPS = {
    f"watch.{rule}.action": "warn" for rule in ("reward_spread", "no_signal", "answered", "cut_off", "searches", "response_short")
}
PACE = {"train.prompts_per_step": 8, "tracking.traces_per_step": 1}
"""Larger steps with fewer traces: MLflow, which checks a password at each request, has the training's cores to share."""
SIZE: dict[str, Any] = {**SMALLEST, **NO_RULE_STOPS, **PACE, "train.steps": STEPS}


@dataclass
class Run:
    """One flow run that trains; `table` has what each fault cost."""

    client: Client
    id: str
    table: list[tuple[str, int, float, float]] = field(default_factory=list[tuple[str, int, float, float]])
    leased: float = 0.0
    """When the server that gave the run its place was killed, in seconds of `time.monotonic()`."""

    @property
    def composed(self) -> Composed:
        return self.client.composed

    def step(self) -> int:
        """Return the newest step on disk, in the unfinished training or in the finished one."""
        space = Workspace(self.composed.workspace)
        logs = [*space.root.glob("artifacts/.work/train-*/metrics.jsonl"), space.folder("train") / "metrics.jsonl"]
        return max((MetricsLog(path).last for path in logs if path.is_file()), default=0)

    def tracked(self) -> int:
        """Return the newest step that MLflow has; 0 while it does not answer."""
        try:
            runs = [run for flow in self.client.tracked(prefect_flow_run_id=self.id) for run in self.trains(flow)]
            return max((step for run in runs for step in self.client.steps(run, "episode/reward")), default=0)
        except AssertionError:
            return 0

    def trains(self, flow: dict[str, Any]) -> list[str]:
        """Return MLflow's runs of the stage train below a flow's."""
        named = {"mlflow.parentRunId": flow["info"]["run_id"], "mlflow.runName": "train"}
        return [run["info"]["run_id"] for run in self.client.tracked(**named)]

    def state(self) -> str:
        """Return the name of the flow run's state."""
        return self.client.run(self.id)["state"]["name"]

    def until(self, true: Callable[[], object], pause_s: float = 3.0) -> None:
        """Wait for something that the training does while it runs. A server that is away has not said that the run is over."""
        assert until(true, over=self._over, pause_s=pause_s), (self.state(), self.composed.logs("worker", "prefect", "mlflow"))

    def _over(self) -> bool:
        if self.client.status(PREFECT, "/api/health", key=True) != 200:
            return False
        state = self.client.run(self.id)["state"]
        # A lost run is marked Crashed before it goes back into its queue.
        return state["type"] in ENDED and not (state["message"] or "").startswith("It sent no heartbeat")

    @contextmanager
    def fault(self, name: str) -> Generator[None]:
        """Wait for a step, do what the block does, and note how long the next steps and their metrics in MLflow took."""
        self.until(lambda: self.step() > 0)
        before, started = self.step(), time.monotonic()
        yield
        # Steps that ended while the fault was being set say nothing of it.
        after = self.step()
        self.until(lambda: self.step() > after + 1)
        on_disk, reached = time.monotonic() - started, self.step()
        # Each question costs MLflow as much as an event does.
        self.until(lambda: self.tracked() >= reached, pause_s=10.0)
        self.table.append((name, before, on_disk, time.monotonic() - started))
        (self.composed.engine.folder / "faults.json").write_text(json.dumps(self.table, indent=1))
        print(f"\n{name}: step {before}, {on_disk:.0f} s until the next but one, {time.monotonic() - started:.0f} s until MLflow has it")


@pytest.fixture(scope="module", name="disk")
def _disk(bench: Bench) -> Generator[Path]:
    """A small disk for the S3 store, where MLflow's artifacts lie."""
    image, mount = bench.engine.folder / "s3.img", bench.engine.folder / "s3"
    mount.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    check("mkfs.ext4", "-q", "-m", "0", str(image))
    check("mount", "-o", "loop", str(image), str(mount))
    try:
        (mount / "data").mkdir()
        subprocess.run(["chown", "1000:1000", str(mount / "data")], check=True)
        yield mount
    finally:
        check("umount", str(mount))
        image.unlink()


def _write_endlessly(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


@contextmanager
def filled(disk: Path) -> Generator[None]:
    """Leave no byte free on a disk while the block runs."""
    filler, rest = disk / "filler", disk / "rest"
    try:
        check("fallocate", "--length", str(shutil.disk_usage(disk).free - REST), str(filler))
        # The last blocks go to whoever comes first: the file system needs some for the file, and the store writes.
        with pytest.raises(OSError, match="No space left"):
            _write_endlessly(rest)
        assert shutil.disk_usage(disk).free < 1 << 20
        yield
    finally:
        for path in (filler, rest):
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module", name="composed")
def _composed(bench: Bench, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Composed]:
    volume = f"volumes: {{s3: {{driver_opts: {{type: none, o: bind, device: {disk / 'data'}}}}}}}\n"
    more = tmp_path_factory.mktemp("compose") / "disk.yaml"
    more.write_text(volume)
    with brought_up(bench, tmp_path_factory.mktemp("workspace"), more) as composed:
        yield composed


@pytest.fixture(scope="module", name="run")
def _run(client: Client) -> Run:
    return Run(client, client.start("laptop", profile="laptop", overrides=SIZE))


def test_the_worker_is_killed(run: Run) -> None:
    with run.fault("worker killed"):
        run.composed.engine.kill(run.composed.container("worker"))
    assert run.client.run(run.id)["run_count"] == 2


def test_prefects_server_is_killed(run: Run) -> None:
    with run.fault("Prefect's server killed"):
        run.composed.engine.kill(run.composed.container("prefect"))
        run.composed.up("prefect")
        run.leased = time.monotonic()
    assert run.state() == "Running"


def test_postgres_is_killed(run: Run) -> None:
    with run.fault("Postgres killed"):
        run.composed.engine.kill(run.composed.container("postgres"))
        run.composed.up("postgres", "prefect", "mlflow")
    assert run.state() == "Running"


def test_the_s3_store_is_gone_for_a_minute(run: Run) -> None:
    with run.fault(f"S3 gone for {AWAY_S} s"):
        run.composed.compose("stop", "s3")
        before = run.step()
        ends = time.monotonic() + AWAY_S
        # The training does not wait for the store.
        run.until(lambda: time.monotonic() > ends and run.step() > before)
        run.composed.up("s3")
    assert run.state() == "Running"


def test_the_disk_of_mlflows_artifacts_is_full(run: Run, disk: Path) -> None:
    with run.fault("disk of MLflow's artifacts full"), filled(disk):
        before = run.step()
        run.until(lambda: run.step() > before + 3)
    # The run holds its deployment's place by a lease of the server that was killed.
    run.until(lambda: time.monotonic() > run.leased + LEASE_S)
    assert run.state() == "Running"


def test_all_is_killed_at_once(run: Run) -> None:
    with run.fault("all containers killed at once"):
        starts = run.client.run(run.id)["run_count"]
        run.composed.engine.crash()
        run.composed.up(*SERVERS)
    assert run.client.run(run.id)["run_count"] == starts + 1


def test_nothing_was_lost(run: Run) -> None:
    last = run.step()
    run.until(lambda: run.tracked() >= last)
    flows = run.client.tracked(prefect_flow_run_id=run.id)
    trains = [train for flow in flows for train in run.trains(flow)]
    every = set(range(1, last + 1))
    assert {step for train in trains for step in run.client.steps(train, "episode/reward")} >= every
    # Each step's episodes are in the S3 store.
    stored = lambda: {int(Path(path).name.partition(".")[0]) for train in trains for path in run.client.artifacts(train, "rollouts")}  # noqa: E731
    run.until(lambda: stored() >= every)
    run.client.ask(PREFECT, f"/api/flow_runs/{run.id}/set_state", {"state": {"type": "CANCELLING"}})
    assert until(lambda: run.state() == "Cancelled", pause_s=3.0), (run.state(), run.composed.logs("worker"))
    assert MetricsLog(next(run.composed.workspace.glob("artifacts/.work/train-*/metrics.jsonl"))).missing(last) == []
