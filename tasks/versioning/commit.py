"""Hand finished stages to DVC, so that `dvc status` is clean and `dvc repro` is a no-op after a flow. Knows the command line of DVC.

A workspace outside git gets a repository without source control. Nothing is run by DVC here: the artifacts stand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from research_rl.errors import ServiceError
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import STAGES, Workspace
from tasks.job import Job
from tasks.versioning import dvc_file
from tasks.versioning.dvc_file import SNAPSHOT

__all__ = ["COMMAND", "commit", "dvc", "environment", "prepare_repository", "record"]

COMMAND = (sys.executable, "-m", "dvc")
_CONFIG = """\
[core]
    no_scm = True
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "reflink,hardlink,copy"
"""


@task(name="dvc-commit", cache_policy=NO_CACHE, persist_result=False)
def commit(job: Job) -> State[list[str]]:
    """Commit every stage that is current; return their names. A failure of DVC is reported, not raised: the artifacts stand."""
    if not job.config.tracking.dvc:
        return Completed(name="Skipped", message="tracking.dvc is false", data=[])
    found = {name: part.hash for name in STAGES if (part := current(name, job.config, job.workspace, verify=False))}
    noted = job.workspace.work("dvc") / "recorded.json"
    if _recorded(job.workspace.root, noted, found):
        return Completed(name="Cached", message="DVC has these artifacts", data=list(found))
    try:
        record(job.workspace, list(found))
    except ServiceError as error:
        get_run_logger().warning("DVC did not take the artifacts: %s", error)
        return Completed(name="NotCommitted", message=str(error)[:500], data=[])
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(found))
    return Completed(message=f"committed {', '.join(found)}", data=list(found))


def _recorded(root: Path, noted: Path, found: dict[str, str]) -> bool:
    """Return whether DVC was given exactly these artifacts last time and its files still stand."""
    files = (root / "dvc.lock", root / "dvc.yaml", root / f"{STAGES[SNAPSHOT].folder}.dvc", noted)
    return all(path.is_file() for path in files) and json.loads(noted.read_text()) == found


def record(workspace: Workspace, finished: Sequence[str]) -> None:
    """Make DVC know the artifacts of `finished`. Raises ServiceError."""
    prepare_repository(workspace.root)
    if SNAPSHOT in finished and not (workspace.root / f"{STAGES[SNAPSHOT].folder}.dvc").is_file():
        dvc(workspace.root, "add", "--quiet", STAGES[SNAPSHOT].folder)
    targets = [f"{STAGES[name].folder}.dvc" if name == SNAPSHOT else name for name in finished]
    if targets:
        dvc(workspace.root, "commit", "--quiet", "--force", *targets)


def prepare_repository(root: Path) -> None:
    """Give `root` a DVC repository and the rendered dvc.yaml unless it has them. Raises ServiceError."""
    if not (root / ".dvc").is_dir():
        dvc(root, "init", "--quiet", "--no-scm")
        (root / ".dvc" / "config").write_text(_CONFIG)
    dvc_file.write(root)


def environment() -> dict[str, str]:
    """Return the environment of a DVC process: this interpreter's commands first on PATH, no usage reports."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}", "DVC_NO_ANALYTICS": "1"}


def dvc(root: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run one DVC command in `root` and return its output. Raises ServiceError with what DVC said."""
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, cwd=root, env={**environment(), **(env or {})}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ServiceError(f"`dvc {' '.join(arguments)}` in {root} ended with code {done.returncode}: {said[-800:]}")
    return done.stdout
