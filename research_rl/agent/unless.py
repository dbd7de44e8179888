"""Work that ends when something else happens first. Knows time; knows neither clients nor models."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["unless"]

T = TypeVar("T")


async def unless(other: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns; cancel it and return None when `other` ends first. Both have ended on return."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(other)
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        # Both may end in one turn of the event loop: then the work counts, as it is done.
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
