"""One process opens something, forks of it use it: its memory is there once. Knows processes; knows nothing of what is opened.

Whoever opens does so in a thread of its own that ends before the first fork. The threads of OpenMP belong to the thread that began them
and end with it, so that the process that is forked has one thread, holds no lock, and each fork begins threads of its own.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from research_rl import errors
from research_rl.errors import ConfigError, ResearchError, ServiceError
from research_rl.process.channel import Channel

__all__ = ["failed", "forked", "in_a_thread", "keep", "raised", "require_forks"]

T = TypeVar("T")
_TASKS = Path("/proc/self/task")
_THREADS_END_S = 5.0


def require_forks(setting: str) -> None:
    """Raise ConfigError where processes cannot share memory by being forked."""
    if sys.platform != "linux":
        raise ConfigError(
            f"{setting} needs Linux, where processes share memory by being forked; set it to 1, or start several services and name them "
            "in retriever.urls"
        )


def forked(run: Callable[[], None]) -> int:
    """Return the pid of a new process that does `run` and ends."""
    sys.stdout.flush()  # or both would write what waits there
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    _ended(run)


def _ended(run: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        # A terminal, a guardian or a container sends signals to all processes; the parent hears them and says what to do.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run()
        code = 0
    except BaseException:  # noqa: BLE001  (the end of a process: what its parent has open is not closed a second time)
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def failed(error: Exception) -> dict[str, Any]:
    """Return an error as a message to the parent, see `raised`."""
    if isinstance(error, ResearchError):
        return {"failed": str(error), "kind": type(error).__name__}
    return {"failed": f"{type(error).__name__}: {error}", "kind": ServiceError.__name__}


def raised(message: dict[str, Any]) -> ResearchError:
    """Return the error that a message of `failed` tells of."""
    kind: type[ResearchError] = getattr(errors, message["kind"], ServiceError)
    return kind(message["failed"])


def keep(channel: Channel, opened: Callable[[], T], name: Callable[[T], str], use: Callable[[T, Channel, int], None]) -> None:
    """Open something, tell the parent its name, and fork a process that uses it for each message with a channel, until none comes.

    `use` is given what was opened, the new process's channel and the number that the message has as `place`.
    """
    try:
        thing = in_a_thread(opened)
        for thread in threading.enumerate():
            if type(thread).__name__ == "TMonitor":  # tqdm's, which looks after bars of progress; there are none any more
                thread.exit()  # type: ignore[attr-defined]
        _require_one_thread()
    except Exception as error:  # noqa: BLE001  (the boundary of this process: the parent is told, whatever it is)
        channel.send(**failed(error))
        return
    # Objects that live on are not looked at by collections of garbage, which would write into each of them.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that ended leave nothing behind
    channel.send(opened=name(thing))
    while order := channel.receive():
        message, handles = order
        end = Channel.of(handles[0])
        place = int(message["place"])

        def used(end: Channel = end, place: int = place) -> None:
            channel.close()
            use(thing, end, place)

        forked(used)
        # The fork's alone: it is closed when that one ends.
        end.close()


def in_a_thread(opened: Callable[[], T]) -> T:
    """Return what a thread of its own returned, or raise what that raised; the threads that OpenMP gave it end with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(opened())
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that waits)
            errors.append(error)

    thread = threading.Thread(target=run, name="opening")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _require_one_thread() -> None:
    """Return once the threads that helped to open have ended. Raises ServiceError."""
    until = time.monotonic() + _THREADS_END_S
    while (count := len(list(_TASKS.iterdir()))) > 1:
        if time.monotonic() > until:
            raise ServiceError(
                f"{count - 1} threads of libraries go on after opening, and such a process cannot be forked; serve by one process"
            )
        time.sleep(0.01)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ServiceError("a model lies on a GPU, which processes cannot share by being forked; serve by one process")
