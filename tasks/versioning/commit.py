"""Hand finished stages to DVC, so that `dvc status` is clean and `dvc repro` is a no-op after a flow. Knows the command line of DVC.

A workspace outside git gets a repository without source control. Nothing is run by DVC here: the artifacts stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import PYTHON
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import STAGES, Workspace
from tasks.job import Job
from tasks.versioning import dvc_file
from tasks.versioning.dvc_file import SNAPSHOT

__all__ = ["COMMAND", "commit", "dvc", "environment", "prepare_repository", "record"]

COMMAND = (PYTHON, "-m", "dvc")
_CONFIG = """\
[core]
    no_scm = True
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "reflink,hardlink,copy"
"""


@task(name="dvc-commit", task_run_name="dvc-commit", cache_policy=NO_CACHE, persist_result=False)
def commit(job: Job) -> State[list[str]]:
    """Commit every stage that is current; return their names. A failure of DVC is reported, not raised: the artifacts stand."""
    if not job.config.tracking.dvc:
        return Completed(name="Skipped", message="tracking.dvc is false", data=[])
    # By sizes: DVC hashes every byte itself.
    hashes = {name: artifact.hash for name in STAGES if (artifact := current(name, job.config, job.workspace, verify=False))}
    note = job.workspace.work("dvc") / "recorded.json"
    # `dvc commit` hashes all artifacts, which takes minutes for a large index.
    if _recorded(job.workspace.root, note, hashes):
        return Completed(name="Cached", message="DVC has these artifacts", data=list(hashes))
    try:
        record(job.workspace, list(hashes), job.config)
    except ServiceError as error:
        get_run_logger().warning("DVC did not take the artifacts: %s", error)
        return Completed(name="NotCommitted", message=str(error)[:500], data=[])
    _note(note, hashes)
    return Completed(message=f"committed {', '.join(hashes)}", data=list(hashes))


def _recorded(root: Path, note: Path, hashes: dict[str, str]) -> bool:
    """Return whether DVC was given exactly these artifacts last time and its files still stand."""
    files = (root / "dvc.lock", root / "dvc.yaml", root / f"{STAGES[SNAPSHOT].folder}.dvc", note)
    try:
        return all(path.is_file() for path in files) and json.loads(note.read_text(encoding="utf-8")) == hashes
    except ValueError:  # a note that was cut off says nothing
        return False


def _note(path: Path, hashes: dict[str, str]) -> None:
    """Write down in one step which artifacts DVC was given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(hashes), encoding="utf-8")
    temporary.replace(path)


def record(workspace: Workspace, finished: Sequence[str], config: Config) -> None:
    """Make DVC know the artifacts of `finished`, as built from `config`. Raises ServiceError."""
    prepare_repository(workspace.root)
    if SNAPSHOT in finished and not (workspace.root / f"{STAGES[SNAPSHOT].folder}.dvc").is_file():
        dvc(workspace.root, "add", "--quiet", STAGES[SNAPSHOT].folder)
    targets = [f"{STAGES[name].folder}.dvc" if name == SNAPSHOT else name for name in finished]
    if targets:
        with _parameters(workspace.root / "params.yaml", config):
            # --force: DVC would ask whether to accept outputs that it did not build.
            dvc(workspace.root, "commit", "--quiet", "--force", *targets)


@contextmanager
def _parameters(path: Path, config: Config) -> Generator[None]:
    """Let params.yaml say for a moment what the artifacts were built from: DVC reads it, and it may have been edited since the run began.

    The edited file stands again afterwards, also when this process is killed in between and a later one gets here. An edit that is
    saved in the meantime wins.
    """
    _put_back(path)
    if _says(path, config):
        yield
        return
    text = configuration.rendered(config, path)
    if path.is_file():
        _aside(path, text).write_bytes(path.read_bytes())
    configuration.save(config, path)
    try:
        yield
    finally:
        _put_back(path)


def _aside(path: Path, text: str) -> Path:
    """Return where the edited file waits while `text` stands in its place."""
    # The name holds the hash of what stands in the file's place: so a later process sees whether it was edited since.
    return path.with_name(f"{path.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.edited")


def _put_back(path: Path) -> None:
    """Restore an edited params.yaml that was put aside, unless it was edited again since."""
    for aside in path.parent.glob(f"{path.name}.*.edited"):
        if path.is_file() and _aside(path, path.read_text(encoding="utf-8")) == aside:
            aside.replace(path)
        else:
            aside.unlink()


def _says(path: Path, config: Config) -> bool:
    """Return whether the file holds this configuration; a file that an editor left broken does not."""
    try:
        return configuration.load(path) == config
    except ConfigError:
        return False


def prepare_repository(root: Path) -> None:
    """Give `root` a DVC repository and the rendered dvc.yaml unless it has them. Raises ServiceError."""
    if not (root / ".dvc").is_dir():
        dvc(root, "init", "--quiet", "--no-scm")
        # no_scm again, because this text replaces what `init` wrote; links, so that the cache does not double a large index.
        (root / ".dvc" / "config").write_text(_CONFIG)
    dvc_file.write(root)


def environment() -> dict[str, str]:
    """Return the environment of a DVC process: this interpreter's commands first on PATH, no usage reports."""
    return {**os.environ, "PATH": f"{Path(PYTHON).parent}:{os.environ.get('PATH', os.defpath)}", "DVC_NO_ANALYTICS": "1"}


def dvc(root: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run one DVC command in `root` and return its output. Raises ServiceError with what DVC said."""
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, cwd=root, env={**environment(), **(env or {})}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise ServiceError(f"`dvc {' '.join(arguments)}` in {root} ended with code {done.returncode}: {reason[-800:]}")
    return done.stdout
