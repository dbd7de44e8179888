"""Work that a service repeats in the background until it ends. Knows time; knows no server.

Invariant: a round that fails, whatever the reason, is told in the log and costs that round alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

__all__ = ["rounds"]

_LOG = logging.getLogger("research_rl.agent")


async def rounds(
    what: str, work: Callable[[], Awaitable[None]], every_s: float, ending: asyncio.Event | None = None, *, at_once: bool = False
) -> None:
    """Do `work` every `every_s` seconds until `ending` is set (for ever without one), the first time after that pause unless `at_once`.

    A failure is logged with its traceback when its text is another than that of the failure before it.
    """
    last_failure, ending = "", ending or asyncio.Event()
    while at_once or not await _set_within(ending, every_s):
        at_once = False
        try:
            await work()
            last_failure = ""
        except Exception as error:  # noqa: BLE001 - the boundary: nobody waits for this task, so nobody would hear of its end
            if repr(error) != last_failure:
                _LOG.exception("%s failed; it is tried again in %g s", what, every_s)
            last_failure = repr(error)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
