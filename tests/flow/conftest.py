"""One workspace for the flow tests: trained at the smallest size, its first run killed in the middle of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from research_rl.paths import CHECKOUT
from research_rl.training.run.checkpoints import complete
from research_rl.training.run.metrics_log import MetricsLog
from tests.databases import lay_prefect
from tests.training import SMALLEST
from tests.waiting import until

SIZE = SMALLEST
GONE_S = 15.0


@dataclass
class Trained:
    """The workspace and what its runs left: logs, seconds, and the steps that stood when the first run was killed."""

    root: Path
    home: Path
    steps_at_kill: int = 0
    left_behind: list[str] = field(default_factory=list[str])
    logs: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])

    @property
    def env(self) -> dict[str, str]:
        """The environment of a run by hand: its own Prefect database, no server of this machine."""
        own = {"PREFECT_HOME": str(self.home), "PYTHONPATH": str(CHECKOUT), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}
        kept = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
        return {**kept, **own, "MLFLOW_TRACKING_URI": f"sqlite:///{self.root}/mlflow.db"}

    def start(self) -> subprocess.Popen[bytes]:
        """Start `python -m flows.train` in the workspace, as `make demo` does in the checkout."""
        command = [sys.executable, "-m", "flows.train", *(f"{name}={value}" for name, value in SIZE.items())]
        with self._log().open("wb") as log:
            return subprocess.Popen(command, cwd=self.root, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def run(self) -> str:
        """Run the flow to its end and return its log."""
        started = time.monotonic()
        code = self.start().wait(3000)
        self.seconds.append(time.monotonic() - started)
        self.logs.append(self._log().read_text())
        assert code == 0, self.logs[-1][-6000:]
        return self.logs[-1]

    def steps(self) -> int:
        """Return the newest training step with a whole checkpoint and recorded metrics, 0 when there is none."""
        folders = list(self.root.glob("artifacts/.work/train-*"))
        saved = [point.step for folder in folders for point in complete(folder / "checkpoints")]
        recorded = [step for folder in folders for step, metrics in MetricsLog(folder / "metrics.jsonl").rows.items() if metrics]
        return min(max(saved, default=0), max(recorded, default=0))

    def _log(self) -> Path:
        return self.root / f"run-{len(self.logs)}.log"


def processes_of(root: Path, home: Path | None = None) -> list[str]:
    """Return the command lines of processes that name a workspace, or whose Prefect is at `home`, and that still run."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            ours = str(root) in words or (home is not None and process.environ().get("PREFECT_HOME") == str(home))
            if ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(words)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run research-train, kill it once a step is saved, run it again to the end."""
    root = tmp_path_factory.mktemp("trained")
    found = Trained(root, tmp_path_factory.mktemp("home"))
    lay_prefect(found.home / "prefect.db")
    first = found.start()
    until(found.steps, over=lambda: first.poll() is not None)
    assert first.poll() is None and found.steps(), found._log().read_text()[-6000:]
    first.send_signal(signal.SIGKILL)
    first.wait()
    found.steps_at_kill = found.steps()
    time.sleep(GONE_S)
    found.left_behind = processes_of(root, found.home)
    found.logs.append(found._log().read_text())
    found.run()
    return found
