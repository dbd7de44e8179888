"""Threads that fetch the pieces of files side by side, try again after failures and report. Knows pieces; `transfer` is its caller.

Invariant: every wait and every number of tries is bounded, and an error of any kind in a thread ends the transfer.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt, wait_random_exponential
from tenacity.stop import stop_when_event_set

from research_rl.config import TransferConfig
from research_rl.data.pieces import PartialFile, Piece
from research_rl.data.sources import TransientError
from research_rl.errors import DataError

__all__ = ["Tell", "Transfer", "pause", "retrying"]

Tell = Callable[[str, float], None]
Step = Callable[[], "list[Step]"]
"""One piece of work for a thread; it returns the steps that it makes possible."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_POLL_S = 0.1
_NOTICE_S = 15.0
_LEAVE_S = 2.0
_DOUBLING = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)


def retrying(attempts: int) -> Retrying:
    """Return the policy of every request: up to `attempts` tries while the failure is a TransientError, the last of which is raised."""
    return Retrying(retry=retry_if_exception_type(TransientError), stop=stop_after_attempt(attempts), wait=pause, reraise=True)


def pause(state: RetryCallState) -> float:
    """Return the seconds before the next try: drawn at random below a limit that doubles, at least what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    return max(_DOUBLING(state), error.wait_s if isinstance(error, TransientError) else 0.0)


class Transfer:
    """A pool of threads over pieces; the calling thread watches, reports and can be interrupted at any time."""

    def __init__(self, files: Sequence[PartialFile], limits: TransferConfig, tell: Tell) -> None:
        self._files, self._limits, self._tell = files, limits, tell
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # Threads replace the pair as a whole, so it is read without the lock.
        self._notice = ("", 0.0)
        self._done = 0
        remote = [file for file in files if file.remote.path is None]
        self._total = sum(file.remote.size or 0 for file in remote)
        self._missing = sum(file.missing() for file in remote)
        self._received = 0
        self._started = time.monotonic()

    def run(self) -> None:
        """Fetch everything or raise the first error, of whatever kind; what a full or read-only disk refuses is a DataError."""
        pool = ThreadPoolExecutor(self._limits.parallel, "transfer")
        running = {pool.submit(self._step, lambda file=file: self._begin(file)) for file in self._files}
        try:
            while running:
                finished, running = wait(running, _POLL_S, FIRST_COMPLETED)
                running |= {pool.submit(self._step, step) for future in finished for step in future.result()}
                self._report()
        except OSError as error:
            raise _explained(error) from error
        finally:
            self._leave(pool, running)

    def _leave(self, pool: ThreadPoolExecutor, running: set[Future[list[Step]]]) -> None:
        """End the threads; one that waits for a silent server is not waited for, its connection's timeout ends it."""
        self._stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(running, _LEAVE_S)

    def _step(self, step: Step) -> list[Step]:
        """Do one step; when it fails, the other threads stop at once and not only when the calling thread has seen the error."""
        if self._stop.is_set():
            return []
        try:
            return step()
        except BaseException:
            self._stop.set()
            raise

    def _begin(self, file: PartialFile) -> list[Step]:
        if file.remote.path is not None:
            if problem := file.used_in_place():
                raise DataError(f"{file.path} {problem}; correct the file or data.sha256")
            return self._complete()
        if file.standing():
            return self._complete()
        pieces = file.begin()
        return [lambda piece=piece: self._piece(piece) for piece in pieces] if pieces else self._finish(file)

    def _complete(self) -> list[Step]:
        with self._lock:
            self._done += 1
        return []

    def _piece(self, piece: Piece) -> list[Step]:
        """Fetch what is missing of a piece; the last one of a file finishes it."""
        self._fill(piece)
        if self._stop.is_set():
            return []
        with self._lock:
            piece.file.left -= 1
            last = not piece.file.left
        return self._finish(piece.file) if last else []

    def _fill(self, piece: Piece) -> None:
        policy = retrying(self._limits.attempts).copy(
            stop=stop_after_attempt(self._limits.attempts) | stop_when_event_set(self._stop),
            # An error of another thread ends the wait for the next try at once.
            sleep=sleep_using_event(self._stop),
            after=_forgiving(piece),
            before_sleep=lambda state: self._say_retry(piece, state),
        )
        try:
            policy(self._receive, piece)
        except TransientError as error:
            if self._stop.is_set():  # another thread's error is the one to tell
                return
            raise DataError(
                f"{error}; gave up after {self._limits.attempts} tries without progress; check the network and rerun to go on"
            ) from error

    def _say_retry(self, piece: Piece, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        tries = f"try {state.attempt_number + 1} of {self._limits.attempts} in {state.upcoming_sleep:.1f} s"
        self._say(f"{piece.file.item.name}: {error}; {tries}")

    def _receive(self, piece: Piece) -> None:
        """Append bytes until the piece is whole; a transfer that cannot be continued begins anew."""
        remote = piece.file.remote
        if not piece.file.ranges:
            piece.path.unlink(missing_ok=True)
        held = piece.held()
        if piece.stop is not None and piece.start + held == piece.stop:
            # The piece of an empty file has nothing to fetch, but joining looks for it.
            piece.path.touch()
            return
        # Unbuffered, so that what counts as received is in the file when the process is killed.
        with piece.path.open("ab", buffering=0) as sink, piece.file.item.source.read(remote, piece.start + held, piece.stop) as body:
            for block in body:
                if self._stop.is_set():
                    return
                held += len(block)
                if piece.stop is not None and piece.start + held > piece.stop:
                    raise TransientError(f"{remote.address} sent more than the {piece.stop - piece.start:,} bytes asked for")
                # A raw write on a disk that runs full may take a part of the block and raise nothing.
                if sink.write(block) != len(block):
                    raise OSError(errno.ENOSPC, "the last write was cut short", str(piece.path))
                with self._lock:
                    self._received += len(block)
        if piece.stop is not None and piece.start + held < piece.stop:
            raise TransientError(f"{remote.address} ended after {piece.start + held:,} of {piece.stop:,} bytes")

    def _finish(self, file: PartialFile) -> list[Step]:
        problem = file.finish()
        if not problem:
            return self._complete()
        file.fetches += 1
        if file.fetches >= self._limits.attempts:
            remedy = "correct data.sha256 or the file at its source"
            raise DataError(f"{file.remote.address} {problem}; refused after {file.fetches} fetches; {remedy}")
        self._say(f"{file.item.name} {problem}; fetching it again ({file.fetches + 1} of {self._limits.attempts})")
        with self._lock:
            self._missing += file.remote.size or 0
        return [lambda: self._begin(file)]

    def _say(self, text: str) -> None:
        self._notice = (text, time.monotonic())

    def _report(self) -> None:
        total, missing = self._total, max(0, self._missing - self._received)
        rate = self._received / max(time.monotonic() - self._started, 1e-9)
        text = f"{self._done} of {len(self._files)} files, {_bytes(total - missing)} of {_bytes(total)}, {_bytes(rate)}/s"
        if rate and missing:
            text += f", {_clock(missing / rate)} left"
        notice, said = self._notice
        if notice and time.monotonic() - said < _NOTICE_S:
            text += f"; {notice}"
        # Locating the files takes the first 2 % of the stage's progress; the second half is for writing `data/`.
        self._tell(text, 0.02 + 0.48 * (total - missing) / max(total, 1))


def _forgiving(piece: Piece) -> Callable[[RetryCallState], None]:
    """Return a hook that counts tries from one again whenever a try brought bytes that the next one need not fetch."""
    before = piece.held()

    def after(state: RetryCallState) -> None:
        nonlocal before
        held = piece.held()
        if piece.file.ranges and held > before:
            # tenacity calls this hook before it looks at the number to decide whether to stop.
            state.attempt_number = 1
        before = held

    return after


def _explained(error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full ({error}); free some room and rerun to go on where it stopped")
    return DataError(f"cannot keep what is fetched: {error}; make the workspace writable and rerun")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
