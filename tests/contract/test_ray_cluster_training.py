"""Training as a job of a real Ray cluster of two node processes: it finishes, and cancelling it leaves nothing on the cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from ray_cluster import Cluster, cluster

from research_rl.paths import CHECKOUT
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(5400)]
SIZE = [
    "data.generated.entities=60",
    "data.generated.train_questions=64",
    "data.generated.dev_questions=8",
    "data.generated.test_questions=16",
    "policy.hidden=64",
    "policy.layers=2",
    "policy.warmup_steps=60",
    "train.prompts_per_step=4",
    "train.rollouts_per_prompt=4",
    "trainer.micro_batch=8",
    "trainer.save_every=1",
    "episode.max_response_tokens=128",
    "episode.max_result_tokens=64",
    "trainer.start_deadline_s=1800",
    "trainer.step_deadline_s=1800",
    "cluster.launcher=ray-job",
    "cluster.lease_s=20",
    "trainer.nodes=2",
    "trainer.gpus_per_node=1",
]


class Workspace:
    """A workspace that trains on a cluster from the command line."""

    def __init__(self, root: Path, ray: Cluster) -> None:
        self.root, self.ray = root, ray
        prefect = {"PREFECT_HOME": str(root / "prefect"), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
        kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        self.env = {**kept, **prefect, **tracking, "RAY_AUTH_TOKEN": ray.token, "PYTHONPATH": str(CHECKOUT)}

    def start(self, stage: str, *overrides: str) -> subprocess.Popen[bytes]:
        command = ["research_rl", "run", stage, "-p", "laptop", "-w", str(self.root)]
        return self._start(command, f"{stage}.log", CHECKOUT, overrides)

    def start_flow(self, *overrides: str) -> subprocess.Popen[bytes]:
        """Start the whole flow as a Prefect worker does, with a Prefect server of its own."""
        return self._start(["flows.train", "-p", "laptop"], "flow.log", self.root, overrides)

    def _start(self, command: list[str], log: str, folder: Path, overrides: tuple[str, ...]) -> subprocess.Popen[bytes]:
        whole = [sys.executable, "-m", *command, *SIZE, f"cluster.address={self.ray.address}", *overrides]
        with (self.root / log).open("ab") as out:
            return subprocess.Popen(whole, env=self.env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)

    def run(self, stage: str, *overrides: str) -> None:
        assert self.start(stage, *overrides).wait(1800) == 0, (self.root / f"{stage}.log").read_text()[-6000:]

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for path in self.root.rglob("metrics.jsonl") if "logs" not in path.parts for line in path.open()]


@pytest.fixture(scope="module")
def ray() -> Generator[Cluster]:
    with cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def workspace(ray: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = Workspace(tmp_path_factory.mktemp("workspace"), ray)
    for stage in ("download", "validate", "prepare", "corpus", "embed", "index", "policy"):
        found.run(stage)
    return found


def test_two_steps_on_two_nodes(workspace: Workspace, ray: Cluster) -> None:
    workspace.run("train", "train.steps=2")
    folder = workspace.root / "artifacts" / "train"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((folder / "checkpoint/actor/fsdp_config.json").read_text())["world_size"] == 2
    (log,) = workspace.root.glob("artifacts/.work/train-*/logs/attempt_1.log")
    assert "Training Progress" in log.read_text()
    assert until(lambda: not ray.busy()), ray.busy()
    assert not list((workspace.root / ".services").rglob("train.job"))


@pytest.mark.parametrize(("flow", "number"), [(False, signal.SIGTERM), (False, signal.SIGKILL), (True, signal.SIGTERM)])
def test_a_cancelled_run_leaves_nothing_on_the_cluster(workspace: Workspace, ray: Cluster, flow: bool, number: int) -> None:
    overrides = ("train.steps=50", f"train.lr={1e-4 + (number + 100 * flow) * 1e-6}")
    driver = workspace.start_flow(*overrides) if flow else workspace.start("train", *overrides)
    before = len(workspace.steps())
    until(lambda: len(workspace.steps()) > before, over=lambda: driver.poll() is not None)
    assert driver.poll() is None, (workspace.root / ("flow.log" if flow else "train.log")).read_text()[-6000:]
    assert any("main_ppo" in words for words in ray.busy())
    driver.send_signal(number)
    driver.wait(PATIENCE_S)
    assert until(lambda: not ray.busy()), ray.busy()
