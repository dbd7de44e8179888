"""Follow an alias of the model registry: when it moves, a service answers with the new version. Knows versions; knows no HTTP.

Invariants: (1) a new model serves only after it played a question to its end; (2) whatever fails, the registry included, the model in
service stays; (3) a version that failed is tried again ever more rarely; (4) at most two models of an alias are loaded at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

from research_rl.agent.answering import Backend, Lease
from research_rl.agent.chosen import Chosen
from research_rl.agent.rounds import rounds
from research_rl.agent.standing import Failure, Standing
from research_rl.config import AgentConfig
from research_rl.episode.agent import Limits, run_episode
from research_rl.episode.trajectory import StopReason
from research_rl.errors import ResearchError, ServiceError

__all__ = ["Following", "Switching", "canary"]

_CANARY = "Who founded the town, and in which year?"
"""Asked where `agent.canary` is empty: any question will do, since no answer is expected."""
_CANARY_S = 120.0
_LONGEST_PAUSE_S = 3600.0
_LOG = logging.getLogger("research_rl.agent")


class Switching(Protocol):
    """A source of answers that can exchange its model; see `WorkspaceSource`."""

    async def __aenter__(self) -> Self:
        """Open it."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        ...

    @property
    def chosen(self) -> Chosen:
        """The model that answers the next question."""
        ...

    @property
    def backend(self) -> Backend:
        """What the next question is answered with."""
        ...

    def lease(self) -> Lease:
        """Return what one question is answered with."""
        ...

    def standing(self) -> Standing:
        """Return what is served, and since when."""
        ...

    async def trouble(self) -> str | None:
        """Return why no question can be answered now; None when one can."""
        ...

    async def switch(self, chosen: Chosen, check: Callable[[Backend], Awaitable[None]], drain_s: float) -> int:
        """Answer with `chosen` once `check` accepted it; return how many questions the old model had to leave. Raises ResearchError."""
        ...


async def canary(backend: Backend, limits: Limits, question: str | None) -> None:
    """Play one question on a model that does not serve yet. Raises ServiceError unless it answers it.

    Without a `question` of the operator's own it has to write something: whether a general question has an answer in this index is not
    known.
    """
    prompt = await asyncio.to_thread(backend.encode, question or _CANARY)
    bounded = replace(limits, wall_s=min(limits.wall_s, _CANARY_S))
    # Observed, as every question is: the engine then streams.
    played = await run_episode(prompt, backend.engine, backend.searcher, backend.tokenizer, bounded, observer=lambda _: None)
    if played.stop is StopReason.ENGINE_FAILURE:
        raise ServiceError(f"its canary question failed: {played.error}")
    if played.stop is StopReason.TIME_LIMIT or not played.response_ids:
        raise ServiceError(f"its canary question brought {len(played.response_ids)} tokens in {bounded.wall_s:g} s and no end")
    if question and played.stop is not StopReason.ANSWERED:
        raise ServiceError(f"it gave no answer to agent.canary={question[:60]!r} ({played.stop.value}); look at the model, or ask another")


@dataclass
class _Refused:
    """A version that could not be switched to: how often it was tried, and when it may be tried again (monotonic seconds)."""

    name: str
    tries: int
    due: float


class Following:
    """A `BackendSource` of the version to which an alias points; `choose` asks the registry, `moved` hears of each switch."""

    def __init__(
        self,
        source: Switching,
        alias: str,
        choose: Callable[[], Chosen],
        config: AgentConfig,
        limits: Limits,
        moved: Callable[[Chosen, str], None] = lambda chosen, model: None,
    ) -> None:
        self._source, self._alias, self._choose, self._config, self._limits, self._moved = source, alias, choose, config, limits, moved
        self._told = Standing("", "", 0.0, alias)
        self._refused: _Refused | None = None

    async def __aenter__(self) -> Self:
        """Open the source and begin to follow."""
        await self._source.__aenter__()
        what = f"following {self._alias}"
        self._following = asyncio.create_task(rounds(what, self.step, self._config.follow_s))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the source; a switch that has begun is given up."""
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._source.__aexit__()

    @property
    def backend(self) -> Backend:
        """What the next question is answered with."""
        return self._source.backend

    def lease(self) -> Lease:
        """Return what one question is answered with."""
        return self._source.lease()

    def standing(self) -> Standing:
        """Return what is served, since when, and what failed last."""
        now = self._source.standing()
        return replace(self._told, model=now.model, version=now.version, since=now.since)

    async def trouble(self) -> str | None:
        """Return why no question can be answered now; None when one can."""
        return await self._source.trouble()

    async def step(self) -> None:
        """Ask the registry once, and switch if the alias has moved."""
        try:
            chosen = await asyncio.to_thread(self._choose)
        except (ResearchError, OSError) as error:
            self._unasked(error)
            return
        self._asked()
        # An alias that was moved back forgives what failed: named again, that version is tried at once.
        if chosen.name == self._source.chosen.name:
            self._refused = None
        elif not (self._refused and self._refused.name == chosen.name and time.monotonic() < self._refused.due):
            await self._switch(chosen)

    async def _switch(self, chosen: Chosen) -> None:
        try:
            left = await self._source.switch(chosen, self._check(chosen), self._config.drain_s)
        # A full disk, for one, may have room when it is tried again.
        except (ResearchError, OSError) as error:
            self._failed(chosen, error)
            return
        self._refused = None
        if left:
            _LOG.error("%d questions still ran agent.drain_s=%g s after the switch; they end with an error", left, self._config.drain_s)

    def _check(self, chosen: Chosen) -> Callable[[Backend], Awaitable[None]]:
        async def check(backend: Backend) -> None:
            await canary(backend, self._limits, self._config.canary)
            # The last thing that can fail: from here on it serves.
            self._moved(chosen, backend.model)
            self._told = replace(self._told, switches=self._told.switches + 1)

        return check

    def _failed(self, chosen: Chosen, error: Exception) -> None:
        tries = self._refused.tries + 1 if self._refused and self._refused.name == chosen.name else 1
        pause = min(self._config.follow_s * 2**tries, _LONGEST_PAUSE_S)
        self._refused = _Refused(chosen.name, tries, time.monotonic() + pause)
        self._told = replace(self._told, failed_switches=self._told.failed_switches + 1, failed=Failure.now(chosen.name, error))
        serves = self._source.chosen.name
        _LOG.error("%s does not serve: %s; %s goes on, and it is tried again in %g s", chosen.name, error, serves, pause)

    def _unasked(self, error: Exception) -> None:
        if self._told.registry is None:
            _LOG.warning("the registry does not say where %s points: %s; %s goes on", self._alias, error, self._source.chosen.name)
        self._told = replace(self._told, registry_failures=self._told.registry_failures + 1, registry=Failure.now(self._alias, error))

    def _asked(self) -> None:
        if self._told.registry:
            _LOG.warning("the registry answers again")
        self._told = replace(self._told, registry=None)
