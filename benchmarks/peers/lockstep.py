"""The rollout pattern of ReSearch's published code (`vllm_rollout.py`), re-implemented: the whole batch moves in rounds.

A round lets every unfinished sequence write until its tag or its end, waits for the slowest, then sends all queries of the
round to the retriever in one request and appends all results. Deviation: it uses our engine, searcher, tokenizer and tags,
so that nothing but the pattern differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from research_rl.episode import protocol
from research_rl.episode.agent import Engine, Limits, Searcher, SearchFailure, Tokenizer

__all__ = ["play"]


async def play(prompts: Sequence[Sequence[int]], engine: Engine, searcher: Searcher, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    """Play all prompts in lock-step; return each one's number of response tokens."""
    contexts = [list(prompt) for prompt in prompts]
    active = {number: 0 for number in range(len(prompts))}
    while active:
        queries = await _write(contexts, active, prompts, engine, tokenizer, limits)
        if not queries:
            break
        found = await searcher.search(list(queries.values()), limits.top_k)
        texts = (
            [""] * len(queries) if isinstance(found, SearchFailure) else ["\n\n".join(p.contents for p in passages) for passages in found]
        )
        for number, text in zip(queries, texts, strict=True):
            body = tokenizer.encode(protocol.neutralise(text))[: limits.max_result_tokens]
            opened, closed = tokenizer.encode(f" {protocol.RESULT_OPEN}\n"), tokenizer.encode(f"\n{protocol.RESULT_CLOSE}")
            contexts[number] += [*opened, *body, *closed]
    return [len(context) - len(prompt) for context, prompt in zip(contexts, prompts, strict=True)]


async def _write(
    contexts: list[list[int]],
    active: dict[int, int],
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    tokenizer: Tokenizer,
    limits: Limits,
) -> dict[int, str]:
    """Let every active sequence write a turn; drop those that ended and return the queries of the others."""
    numbers = list(active)
    budgets = [limits.max_response_tokens - len(contexts[n]) + len(prompts[n]) for n in numbers]
    turns = await asyncio.gather(
        *(engine.generate(contexts[n], (protocol.SEARCH_CLOSE,), budget) for n, budget in zip(numbers, budgets, strict=True))
    )
    queries: dict[int, str] = {}
    for number, turn in zip(numbers, turns, strict=True):
        contexts[number] += turn.ids
        query = protocol.last_query(tokenizer.decode(turn.ids))
        full = len(contexts[number]) - len(prompts[number]) >= limits.max_response_tokens
        if turn.finished_by == "stop" and query and not full and active[number] < limits.max_searches:
            queries[number] = query
            active[number] += 1
        else:
            del active[number]
    return queries
