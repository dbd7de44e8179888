"""The lock of a workspace: one run at a time, whichever driver started it. Knows files and process ids; knows no stage.

Invariants: (1) flows, `research run` and the stages that `dvc repro` starts hold the same lock; (2) the operating system releases
it when its holder ends, however that happens; (3) whoever has to wait, or is refused, is told who holds it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from research_rl.errors import ServiceError, StorageError
from research_rl.pipeline.stages import Workspace

__all__ = ["locked"]

_NAME = ".workspace"
_POLL_S = 0.2


@contextmanager
def locked(
    workspace: Workspace, wait_s: float, holder: str = "", on_wait: Callable[[str], None] | None = None, *, name: str = _NAME
) -> Generator[None]:
    """Hold the workspace's lock for a block, or that of the part of it which `name` names.

    `holder` says in a few words what this process does with the workspace.
    Another holder is waited for `wait_s` seconds (`math.inf`: as long as it takes); `on_wait` is called once, with its description.
    Raises ServiceError when it still holds the lock then, and StorageError when the lock file cannot be written.
    """
    path = workspace.work("locks") / name
    with _opened(path) as stream:
        _acquire(stream, path, workspace, wait_s, on_wait)
        # Only now: until the lock is ours the file names the other holder.
        stream.truncate(0)
        stream.write(f"{os.getpid()} ({holder})" if holder else str(os.getpid()))
        stream.flush()
        yield


def _opened(path: Path) -> IO[str]:
    """Open the lock file without emptying it: it names the holder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"the lock {path} cannot be written ({error.strerror}); give this user write access to the workspace, or use another one"
        ) from None


def _acquire(stream: IO[str], path: Path, workspace: Workspace, wait_s: float, on_wait: Callable[[str], None] | None) -> None:
    deadline = time.monotonic() + wait_s
    while not _taken(stream):
        owner = f"process {path.read_text(encoding='utf-8').strip() or 'unknown'}"
        # After a try, so that wait_s=0 asks once.
        if time.monotonic() >= deadline:
            raise ServiceError(f"{workspace.root} is in use by {owner}; wait for it or use another workspace")
        if on_wait:
            on_wait(owner)
            on_wait = None
        time.sleep(_POLL_S)


def _taken(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
