"""Our own protocol, and controls within it that take one ability away or give one: what a score consists of shows in the differences.

closed-book refuses every search, so that only what the model knows remains. single-search makes one search with the question itself and
refuses all others. oracle gives the passages that answer the question, as the result of a search that was made already, and finds them,
and nothing else, by every further search, whatever its query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from research_rl.episode import protocol
from research_rl.episode.agent import Limits, Searcher, SearchFailure, run_episode
from research_rl.episode.prompts import encode_prompt
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ConfigError, ModelError
from research_rl.evaluation.methods.base import Method, Played, Tools, lost_prompt
from research_rl.evaluation.results import HeldOutQuestion

__all__ = ["CLOSED_BOOK", "ORACLE", "RESEARCH", "SINGLE_SEARCH"]

_REFUSED = SearchFailure("no search is left", SearchFault.REFUSED)
"""Of the kind that is the query's own fault: a control that refuses must not look like an outage."""


async def _research(question: HeldOutQuestion, tools: Tools) -> Played:
    return await _episode(question, tools, tools.searcher)


async def _closed_book(question: HeldOutQuestion, tools: Tools) -> Played:
    return await _episode(question, tools, _Nothing())


async def _single_search(question: HeldOutQuestion, tools: Tools) -> Played:
    return await _episode(question, tools, _Once(tools.searcher), asked=True)


async def _oracle(question: HeldOutQuestion, tools: Tools) -> Played:
    given = list(tools.passages(question.supporting))
    # Shown whole: a passage that the limit on results cuts would be a limit of ours, and the control is to have none.
    needed = len(tools.tokenizer.encode(protocol.neutralise("\n\n".join(passage.contents for passage in given))))
    limits = replace(tools.limits, max_result_tokens=max(tools.limits.max_result_tokens, needed))
    return await _episode(question, replace(tools, limits=limits), _Always(given), asked=True)


async def _episode(question: HeldOutQuestion, tools: Tools, searcher: Searcher, *, asked: bool = False) -> Played:
    """Play our protocol; with `asked` the prompt ends with a search for the question, and the response begins with its result."""
    try:
        prompt = encode_prompt(tools.tokenizer, question.question, tools.prompt)
    except (ConfigError, ModelError) as error:
        return lost_prompt(error)
    limits, first_query = _limits(tools, len(prompt)), None
    if asked:
        first_query = question.question
        search = protocol.neutralise(first_query)
        prompt = [*prompt, *tools.tokenizer.encode(f" {protocol.SEARCH_OPEN} {search} {protocol.SEARCH_CLOSE}")]
    return Played(await run_episode(prompt, tools.engine, searcher, tools.tokenizer, limits, first_query=first_query))


def _limits(tools: Tools, prompt_tokens: int) -> Limits:
    if not tools.published_limits:
        return tools.limits
    # In the published evaluation the limit is on prompt and response together.
    return replace(tools.limits, max_response_tokens=tools.limits.max_response_tokens - prompt_tokens)


class _Nothing:
    """A searcher that refuses every search."""

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        return _REFUSED


@dataclass
class _Always:
    """A searcher that finds the same passages, whatever is asked."""

    passages: list[Passage]

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        return [self.passages for _ in queries]


@dataclass
class _Once:
    """A searcher that forwards its first search and refuses all others."""

    searcher: Searcher
    used: bool = field(default=False, init=False)

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        if self.used:
            return _REFUSED
        self.used = True
        return await self.searcher.search(queries, top_k)


_TAGS = (" ".join(protocol.TAGS),)
RESEARCH = Method("research", "our protocol: reason, search as often as needed, answer in a box", _research, _TAGS, chat=True)
CLOSED_BOOK = Method(
    "closed-book", "our protocol with every search refused: what the model knows", _closed_book, _TAGS, chat=True, searches=False
)
SINGLE_SEARCH = Method(
    "single-search", "our protocol with one search, for the question itself, already made", _single_search, _TAGS, chat=True
)
ORACLE = Method(
    "oracle",
    "our protocol with just the supporting passages, given as the result of a search and found by every other",
    _oracle,
    _TAGS,
    chat=True,
    needs_support=True,
    searches=False,
    revision=2,
)
