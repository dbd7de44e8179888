"""`--dry-run` of paper-7b: everything resolved, zero unexplained differences from the paper, and nothing built."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import yaml

from research_rl.config import Config, load_profile
from research_rl.paths import CHECKOUT
from tests.databases import lay_prefect


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"PREFECT_HOME": str(folder / "home"), "PYTHONPATH": str(CHECKOUT), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    workspace = folder / "workspace"
    workspace.mkdir(exist_ok=True)
    lay_prefect(folder / "home/prefect.db")
    command = [sys.executable, "-m", "flows.train", "--dry-run", *arguments]
    return subprocess.run(command, cwd=workspace, env={**kept, **own}, capture_output=True, text=True)


def test_a_dry_run_shows_everything_and_builds_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "paper-7b")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "15 differ, 0 of them without a reason" in done.stdout
    parameters, _, hydra = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", done.stdout, re.DOTALL))
    assert Config.model_validate(parameters) == load_profile("paper-7b")
    assert hydra["actor_rollout_ref"]["actor"]["optim"]["lr"] == 1e-6 and hydra["trainer"]["nnodes"] == 8
    assert "GPU-hours" in done.stdout and "trainer.nnodes=8" in done.stdout.splitlines()
    assert list((tmp_path / "workspace").iterdir()) == []
    with sqlite3.connect(tmp_path / "home" / "prefect.db") as connection:
        shown = dict(connection.execute("select key, data from artifact where key like 'dry-run%'").fetchall())
    assert set(shown) == {"dry-run", "dry-run-paper"} and "Overrides of verl" in shown["dry-run"]


def test_what_cannot_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "paper-32b", "trainer.nodes=1", "trainer.gpus_per_node=1", "trainer.tensor_parallel=1")
    assert done.returncode == 1 and re.search(r"32\.8 B parameters on 1 x 1 GPUs needs \d+ GiB", done.stderr)
    assert list((tmp_path / "workspace").iterdir()) == []
