"""Threads that fetch the pieces of files side by side, try again after failures and report. Knows pieces; `transfer` is its caller."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from research_rl.config import TransferConfig
from research_rl.data.pieces import PartialFile, Piece
from research_rl.data.sources import TransientError
from research_rl.errors import DataError

__all__ = ["Tell", "Transfer", "pause"]

Tell = Callable[[str, float], None]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0
_POLL_S = 0.1
_NOTICE_S = 15.0
_LEAVE_S = 2.0


class Transfer:
    """Worker threads over pieces; the calling thread watches, reports and can be interrupted at any time."""

    def __init__(self, files: Sequence[PartialFile], limits: TransferConfig, tell: Tell) -> None:
        self._files, self._limits, self._tell = files, limits, tell
        self._todo: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._notice = ("", 0.0)
        self._open = len(files)
        remote = [file for file in files if file.remote.path is None]
        self._total = sum(file.remote.size or 0 for file in remote)
        self._missing = sum(file.missing() for file in remote)
        self._received = 0
        self._started = time.monotonic()

    def run(self) -> None:
        """Fetch everything or raise the first error."""
        self._todo.extend([lambda file=file: self._begin(file) for file in self._files])
        workers = [threading.Thread(target=self._work, name=f"transfer-{n}", daemon=True) for n in range(self._limits.parallel)]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                workers[-1].join(_POLL_S)
                self._report()
        finally:
            self._stop.set()
            deadline = time.monotonic() + _LEAVE_S
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if self._open:
            raise RuntimeError(f"{self._open} files are unfinished though no transfer failed")

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                step = self._todo.popleft() if self._todo else None
                if step is None and not self._open:
                    return
            if step is None:
                self._stop.wait(_POLL_S)
                continue
            try:
                step()
            except (DataError, OSError) as error:
                self._errors.append(_told(error))
                self._stop.set()

    def _begin(self, file: PartialFile) -> None:
        if file.remote.path is not None:
            if problem := file.used_in_place():
                raise DataError(f"{file.path} {problem}; correct the file or data.sha256")
            self._close()
        elif file.standing():
            self._close()
        else:
            pieces = file.begin()
            if not pieces:
                self._finish(file)
            with self._lock:
                self._todo.extend([lambda piece=piece: self._piece(piece) for piece in pieces])

    def _close(self) -> None:
        with self._lock:
            self._open -= 1

    def _piece(self, piece: Piece) -> None:
        """Fetch what is missing of a piece; the last one of a file finishes it."""
        self._fill(piece)
        if self._stop.is_set():
            return
        with self._lock:
            piece.file.left -= 1
            last = not piece.file.left
        if last:
            self._finish(piece.file)

    def _fill(self, piece: Piece) -> None:
        fails = 0
        while not self._stop.is_set():
            before = piece.held()
            try:
                self._receive(piece)
                return
            except TransientError as error:
                fails = 1 if piece.file.ranges and piece.held() > before else fails + 1
                if fails >= self._limits.attempts:
                    raise DataError(
                        f"{error}; gave up after {fails} tries without progress; check the network and rerun to go on"
                    ) from error
                self._wait(piece, error, fails)

    def _wait(self, piece: Piece, error: TransientError, fails: int) -> None:
        seconds = pause(fails, error.wait_s)
        self._say(f"{piece.file.item.name}: {error}; try {fails + 1} of {self._limits.attempts} in {seconds:.1f} s")
        self._stop.wait(seconds)

    def _receive(self, piece: Piece) -> None:
        """Append bytes until the piece is whole; a transfer that cannot be continued begins anew."""
        remote = piece.file.remote
        if not piece.file.ranges:
            piece.path.unlink(missing_ok=True)
        held = piece.held()
        if piece.stop is not None and piece.start + held == piece.stop:
            piece.path.touch()
            return
        with piece.path.open("ab", buffering=0) as sink, piece.file.item.source.read(remote, piece.start + held, piece.stop) as body:
            for block in body:
                if self._stop.is_set():
                    return
                held += len(block)
                if piece.stop is not None and piece.start + held > piece.stop:
                    raise TransientError(f"{remote.address} sent more than the {piece.stop - piece.start:,} bytes asked for")
                if sink.write(block) != len(block):
                    raise OSError(errno.ENOSPC, "the last write was cut short", str(piece.path))
                with self._lock:
                    self._received += len(block)
        if piece.stop is not None and piece.start + held < piece.stop:
            raise TransientError(f"{remote.address} ended after {piece.start + held:,} of {piece.stop:,} bytes")

    def _finish(self, file: PartialFile) -> None:
        problem = file.finish()
        if not problem:
            self._close()
            return
        file.fetches += 1
        if file.fetches >= self._limits.attempts:
            remedy = "correct data.sha256 or the file at its source"
            raise DataError(f"{file.remote.address} {problem}; refused after {file.fetches} fetches; {remedy}")
        self._say(f"{file.item.name} {problem}; fetching it again ({file.fetches + 1} of {self._limits.attempts})")
        with self._lock:
            self._missing += file.remote.size or 0
            self._todo.append(lambda: self._begin(file))

    def _say(self, text: str) -> None:
        self._notice = (text, time.monotonic())

    def _report(self) -> None:
        total, missing = self._total, max(0, self._missing - self._received)
        rate = self._received / max(time.monotonic() - self._started, 1e-9)
        done = len(self._files) - self._open
        text = f"{done} of {len(self._files)} files, {_bytes(total - missing)} of {_bytes(total)}, {_bytes(rate)}/s"
        if rate and missing:
            text += f", {_clock(missing / rate)} left"
        notice, said = self._notice
        if notice and time.monotonic() - said < _NOTICE_S:
            text += f"; {notice}"
        self._tell(text, 0.02 + 0.48 * (total - missing) / max(total, 1))


def pause(fails: int, asked_s: float = 0.0) -> float:
    """Return seconds to wait after `fails` failures in a row: doubling, drawn at random, at least what the server asked for."""
    return max(asked_s, random.uniform(0.5, 1.0) * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (fails - 1)))


def _told(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full ({error}); free some room and rerun to go on where it stopped")
    return (
        DataError(f"cannot keep what is fetched: {error}; make the workspace writable and rerun") if isinstance(error, OSError) else error
    )


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
