"""The lines of an open pipe, each read when it is wanted. Knows bytes and threads; knows no question.

Invariants: (1) at most `_PIECE` bytes are read ahead of the line that is wanted, and a line takes no more memory than `LONGEST`; (2) an
event loop goes on while a line is waited for, and neither it nor the process waits for that line when it ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["LONGEST", "Line", "in_thread", "lines"]

LONGEST = 1 << 20
"""Bytes of the longest line that is taken."""
_PIECE = 1 << 16
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """A line without the spaces around it; `fault` says why it cannot be taken as it is."""

    text: str
    fault: str | None = None


def lines(handle: int) -> Iterator[Line]:
    """Yield the lines of an open file as they come, empty ones left out."""
    # Not by sys.stdin: the interpreter aborts when it ends while a thread that waits for a line holds the lock of its buffer.
    rest = b""
    while piece := os.read(handle, _PIECE):
        *whole, rest = (rest + piece).split(b"\n")
        yield from filter(_is_full, map(_line, whole))
        # Of a line that is too long only this is kept, so that it still shows as one.
        rest = rest[: LONGEST + 1]
    yield from filter(_is_full, [_line(rest)])


def _is_full(line: Line) -> bool:
    return bool(line.text or line.fault)


def _line(raw: bytes) -> Line:
    if len(raw) > LONGEST:
        # Its beginning shows which line it was.
        return Line(raw[:200].decode(errors="replace").strip(), f"the line has more than {LONGEST:,} bytes; shorten it")
    try:
        return Line(raw.decode().strip())
    except UnicodeDecodeError as error:
        fault = f"the line is not UTF-8 at byte {error.start + 1}; convert it first, for example by iconv"
        return Line(raw.decode(errors="replace").strip(), fault)


async def in_thread(items: Iterator[T]) -> AsyncGenerator[T]:
    """Yield the items, none of which may be None. Each is waited for by a thread of its own, which starts when the item is asked for."""
    while True:
        coming: Future[T | None] = Future()
        # One that runs cannot be cancelled: nothing could wake the thread, which sets a result that nobody reads.
        coming.set_running_or_notify_cancel()
        threading.Thread(target=_take, args=(items, coming), name="piped", daemon=True).start()
        if (item := await asyncio.wrap_future(coming)) is None:
            return
        yield item


def _take(items: Iterator[T], coming: Future[T | None]) -> None:
    try:
        coming.set_result(next(items, None))
    except Exception as error:  # noqa: BLE001 - raised where the item is waited for
        coming.set_exception(error)
