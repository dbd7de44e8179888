"""Play a share of the answered questions with a challenger and record both answers. Knows episodes and a file; knows no HTTP.

Invariants: (1) no answer waits for the challenger, and none of its answers is shown to anybody; (2) what it cannot keep up with is
dropped and counted, not piled up; (3) a line of the file holds both sides of one question, or says why the challenger has none.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from research_rl.agent import answering
from research_rl.agent.answering import Backend, Finished
from research_rl.episode.agent import Limits
from research_rl.errors import ResearchError
from research_rl.pipeline import json_lines
from research_rl.pipeline.stages import Workspace

__all__ = ["AnsweredQuestion", "Challenger", "Shadow", "shadow_file"]

_WAITING = 32
"""Most questions that wait for the challenger."""
_LOG = logging.getLogger("research_rl.agent")
Json = dict[str, Any]


def shadow_file(workspace: Workspace) -> Path:
    """Return the file with what both models answered."""
    return workspace.root / "artifacts" / "agent" / "shadow.jsonl"


class Challenger(Protocol):
    """Where a second model is taken from: open while the service runs."""

    async def __aenter__(self) -> Self:
        """Open it."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        ...

    @property
    def backend(self) -> Backend | None:
        """What it answers with; None while it does not."""
        ...


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question that was answered: its id, its text, its limits, which model answered, and what came of it."""

    identifier: str
    question: str
    limits: Limits
    backend: Backend
    finished: Finished
    seconds: float


@dataclass
class Shadow:
    """A challenger, the `share` (0 to 1) of questions that it plays, and the file in which both sides are kept."""

    challenger: Challenger
    name: str
    share: float
    path: Path
    draw: Callable[[], float] = random.random
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("played", "dropped", "failed"), 0))
    """Questions played; dropped because too many waited or the challenger did not answer; failed: no line could be made or kept."""
    _queue: asyncio.Queue[AnsweredQuestion] = field(default_factory=lambda: asyncio.Queue[AnsweredQuestion](_WAITING))

    async def __aenter__(self) -> Self:
        """Open the challenger and begin to play what is offered."""
        await self.challenger.__aenter__()
        self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End; what waits is dropped."""
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        await self.challenger.__aexit__()

    def offer(self, played: AnsweredQuestion) -> None:
        """Take a question that was answered, or leave it. Returns at once."""
        if self.draw() >= self.share:
            return
        try:
            self._queue.put_nowait(played)
        except asyncio.QueueFull:
            self.counts["dropped"] += 1

    def facts(self) -> Json:
        """Return what operators are told."""
        return {"version": self.name, "share": self.share, "ready": self.challenger.backend is not None, **self.counts}

    async def _work(self) -> None:
        while True:
            played = await self._queue.get()
            backend = self.challenger.backend
            if backend is None:
                self.counts["dropped"] += 1
                continue
            try:
                line = await self._line(played, backend)
                await asyncio.to_thread(json_lines.append, self.path, line, private=True)
            except Exception as error:  # noqa: BLE001 - the boundary: whatever a challenger does costs this question alone
                self.counts["failed"] += 1
                # Logged once: a challenger that fails on every question would fill the log, and the counter goes on.
                if self.counts["failed"] == 1:
                    _LOG.exception("no line is written to %s: %s", self.path, error)
            else:
                self.counts["played"] += 1

    async def _line(self, played: AnsweredQuestion, backend: Backend) -> Json:
        head: Json = {"time": round(time.time(), 3), "id": played.identifier, "question": played.question}
        champion = _side(played.backend, played.finished, played.seconds)
        return {**head, "champion": champion, "challenger": await self._challenged(played, backend)}

    async def _challenged(self, played: AnsweredQuestion, backend: Backend) -> Json:
        began = time.monotonic()
        try:
            # Its own prompt: another policy may have another tokenizer and chat template.
            prompt = await asyncio.to_thread(backend.encode, played.question)
        except ResearchError as error:
            return {"model": backend.model, "version": backend.version, "error": str(error)}
        finished: Finished | None = None
        # Nobody reads along, so whole turns will do, which cost less.
        async with aclosing(answering.answer(backend, prompt, played.limits, word_by_word=False)) as parts:
            async for part in parts:
                finished = part if isinstance(part, Finished) else finished
        assert finished, "an episode ends with what came of it"
        return _side(backend, finished, time.monotonic() - began)


def _side(backend: Backend, finished: Finished, seconds: float) -> Json:
    trajectory = finished.trajectory
    return {
        "model": backend.model,
        "version": backend.version,
        "answer": finished.answer,
        "supported": finished.supported,
        "stop": trajectory.stop.value,
        "searches": [record.query for record in trajectory.searches],
        "read_tokens": finished.read_tokens,
        "written_tokens": finished.written_tokens,
        "seconds": round(seconds, 3),
        "error": trajectory.error,
    }
