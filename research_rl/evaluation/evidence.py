"""Change the evidence: what searches found is taken away, exchanged or spoiled before the model reads it, to see which answers rest on it.

Knows passages, questions and searchers; knows no cell, no file and no number. Invariants: (1) the model is told nothing of the change, and
a reply has as many passages as before where the index has enough; (2) equal question, query, share and seed give equal passages, in any
order of asking; (3) the places that a share of noise takes are among those that a larger share takes; (4) a search that failed stays one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from research_rl.config import IndexConfig
from research_rl.episode.agent import Searcher, SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ConfigError
from research_rl.evaluation.results import HeldOutQuestion
from research_rl.reward.metrics import contains, findable, normalize

__all__ = ["SUPPORTING", "SWAPS", "Change", "Evidence", "chosen", "is_known", "unchanged"]

SUPPORTING = "supporting"
SWAPS = ("bm25",)
"""Kinds of index whose replies can take the place of the workspace's own."""
_WIDEST = 8
"""A search that passages were taken from is repeated for up to so many times as many passages."""
_TRIES = 10
"""Questions that are asked for a passage of noise before the place keeps its own."""

Change = Callable[[HeldOutQuestion, Searcher], Searcher]
"""Returns the searcher that a question is played with."""
Passages = Callable[[Sequence[str]], Sequence[Passage]]


def unchanged(question: HeldOutQuestion, searcher: Searcher) -> Searcher:
    """Return the searcher as it is."""
    return searcher


@dataclass(frozen=True)
class Evidence:
    """One change: without supporting passages, with the replies of another kind of index, or with a share of noise from 0 to 1."""

    kind: Literal["without", "swap", "noise"]
    value: str

    @property
    def shown(self) -> str:
        """The name for tables."""
        return {"without": f"without {self.value}", "swap": f"swapped for {self.value}", "noise": f"noise {self.value}"}[self.kind]

    def decides(self, index: IndexConfig) -> dict[str, Any]:
        """Return what decides it beside the cell's other parameters."""
        # Of the index in the workspace's stead: its passages are those of the corpus, a parent of the cell.
        words = {"k1": index.k1, "b": index.b} if self.kind == "swap" else {}
        return {"kind": self.kind, "value": self.value, **words}

    def require(self, index: Mapping[str, Any]) -> None:
        """Raise ConfigError when an index with these facts of its manifest is what its replies would be exchanged for."""
        if self.kind == "swap" and index.get("kind") == self.value:
            raise ConfigError(f"--swap {self.value}: the workspace's own index is of that kind, so nothing would change; leave it out")

    def refusal(self, questions: Sequence[HeldOutQuestion]) -> str | None:
        """Return why it cannot be applied to these questions, None when it can."""
        if self.kind == "without" and not any(is_known(question.supporting, question.golden_answers) for question in questions):
            return "no question names supporting passages or an answer that can be looked for"
        if self.kind == "noise" and len({question.question for question in questions}) < 2:
            return "noise comes from other questions, and there is only one"
        return None

    def change(self, questions: Sequence[HeldOutQuestion], passages: Passages, seed: int) -> Change:
        """Return what is to be done to the searcher of each of these questions, which are all of their set. Raises ManifestError."""
        if self.kind == "without":
            # Read here for the first time, so that a corpus that is gone is one error, and not one in each episode.
            passages(())
            return lambda question, searcher: _Without(searcher, _supporting(question, passages))
        if self.kind == "noise":
            return lambda question, searcher: _Noise(searcher, question, questions, float(self.value), seed)
        return unchanged


def chosen(without: str | None, swap: str | None, noise: str | None) -> tuple[Evidence, ...]:
    """Return the changes that a command names; shares of noise are separated by commas. Raises ConfigError."""
    changes = [Evidence("without", without)] if without else []
    changes += [Evidence("swap", swap)] if swap else []
    return (*changes, *(Evidence("noise", _share(text)) for text in (noise or "").split(",") if text))


def is_known(supporting: Sequence[str], golds: Sequence[str]) -> bool:
    """Return whether it can be told which passages answer a question: by their ids, or by an answer that can be looked for."""
    return bool(supporting or findable(golds))


def _share(text: str) -> str:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ConfigError(f"--noise {text} is no share of the passages; name one above 0 and up to 1, such as 0.5")
    return f"{share:g}"


def _supporting(question: HeldOutQuestion, passages: Passages) -> Callable[[Passage], bool]:
    """Return whether a passage is evidence: a supporting one or one of its title, or where the data names none, one with an answer."""
    if not question.supporting:
        golds = findable(question.golden_answers)
        return lambda passage: bool(golds) and contains(passage.contents, golds) > 0
    ids, titles = set(question.supporting), {_title(passage) for passage in passages(question.supporting)} - {""}
    # Where articles are cut into passages, the facts of a supporting one may stand in its neighbours as well.
    return lambda passage: passage.id in ids or _title(passage) in titles


def _title(passage: Passage) -> str:
    return normalize(passage.contents.partition("\n")[0])


@dataclass
class _Without:
    """A searcher that finds what would be found if some passages were not in the index."""

    searcher: Searcher
    removed: Callable[[Passage], bool]

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        replies: list[list[Passage]] = []
        for query in queries:
            reply = await self._one(query, top_k)
            if isinstance(reply, SearchFailure):
                return reply
            replies.append(reply)
        return replies

    async def _one(self, query: str, top_k: int) -> list[Passage] | SearchFailure:
        depth, left = top_k, list[Passage]()
        while True:
            reply = await self.searcher.search([query], depth)
            if isinstance(reply, SearchFailure):
                # A service may allow fewer passages than would fill the reply.
                return left if depth > top_k and reply.fault is SearchFault.REFUSED else reply
            left = [passage for passage in reply[0] if not self.removed(passage)][:top_k]
            # A reply that is shorter than was asked for holds all that the index has.
            if len(left) == top_k or len(reply[0]) < depth or depth >= _WIDEST * top_k:
                return left
            depth *= 2


@dataclass
class _Noise:
    """A searcher that replaces each passage, with the chance `share`, by one that is found for another question."""

    searcher: Searcher
    question: HeldOutQuestion
    questions: Sequence[HeldOutQuestion]
    share: float
    seed: int

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        replies = await self.searcher.search(queries, top_k)
        if isinstance(replies, SearchFailure):
            return replies
        spoiled: list[list[Passage]] = []
        for query, reply in zip(queries, replies, strict=True):
            passages = await self._one(query, reply, top_k)
            if isinstance(passages, SearchFailure):
                return passages
            spoiled.append(passages)
        return spoiled

    async def _one(self, query: str, reply: Sequence[Passage], top_k: int) -> list[Passage] | SearchFailure:
        passages, asked = list(reply), self.question
        for place, own in enumerate(reply):
            # Of a text, Python's generator makes the same seed in every process.
            drawn = random.Random("\0".join([str(self.seed), asked.data_source, asked.id, asked.question, query, str(place)]))
            # The first number drawn decides, whatever the share, so a larger share takes every place of a smaller one.
            if drawn.random() < self.share:
                other = await self._other(drawn, {passage.id for passage in (*passages, *reply)}, top_k)
                if isinstance(other, SearchFailure):
                    return other
                # With the place's own score, which must not tell that the passage is another.
                passages[place] = replace(other, score=own.score) if other else own
        return passages

    async def _other(self, drawn: random.Random, shown: set[str], top_k: int) -> Passage | SearchFailure | None:
        """Return a passage that is found for another question, is not shown yet and supports nothing here; None where none turns up."""
        for _ in range(_TRIES):
            other = drawn.choice(self.questions)
            if other.question == self.question.question:
                continue
            reply = await self.searcher.search([other.question], top_k)
            if isinstance(reply, SearchFailure):
                return reply
            if fresh := [passage for passage in reply[0] if passage.id not in shown and passage.id not in self.question.supporting]:
                return drawn.choice(fresh)
        return None
