"""Protocol traces for the warm-up of a tiny policy: episodes in other fictional worlds, written by rule.

Knows worlds and text; knows no token, no trainer. Invariants: (1) no name of these worlds occurs in an encyclopedia;
(2) the pieces of a trace are those of `agent.run_episode`; (3) results are what the lexical encoder finds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from research_rl.config import PolicyConfig, PromptConfig
from research_rl.data import encyclopedia, names
from research_rl.data.encyclopedia import Hop, World, WorldQuestion
from research_rl.data.names import Kind, Side
from research_rl.embedding.lexical import LexicalEncoder
from research_rl.episode import prompts, protocol
from research_rl.training.policy_env import tiny

__all__ = ["Trace", "lesson", "lexicon"]

_TOP_K = 3
_DIM = 512
_QUESTIONS_PER_WORLD = 400
_NAMES_PER_DRILL = 10
_YEARS_PER_DRILL = 4
_RESULT_OPENS = f" {protocol.RESULT_OPEN}\n"
_RESULT_CLOSES = f"\n{protocol.RESULT_CLOSE}"


@dataclass(frozen=True)
class Trace:
    """One episode as text pieces; True marks what the policy writes."""

    pieces: tuple[tuple[str, bool], ...]


def lexicon(config: PolicyConfig, prompt: PromptConfig) -> list[str]:
    """Return every word that prompts, passages and traces can hold."""
    # The prompt's own words, and those that `_search` and `_answer` put between names and relations.
    frame = prompts.render(" ", prompt) + " I need the of Now The is Compare and"
    # Marks and tags are tokens already.
    plain = "".join(mark if mark.isalnum() else " " for mark in frame)
    return list(dict.fromkeys([*encyclopedia.lexicon(config.warmup_world.name_words), *plain.split()]))


def lesson(config: PolicyConfig, prompt: PromptConfig, seed: int) -> Iterator[Trace]:
    """Yield the whole warm-up in order: copying drills, traces that search enough, then traces that often stop too early."""
    batch, steps = config.warmup_batch, config.warmup_steps
    early = round(config.warmup_early_share * steps)
    # Copying first: a search is of no use to a policy that cannot copy a name from what it reads.
    yield from itertools.islice(_drills(config, seed), config.warmup_drills * batch)
    drawn = _worlds(config, seed)
    for number in range(steps * batch):
        question, results, rng = next(drawn)
        stop = question.depth if number < (steps - early) * batch else _stop(question, config, rng)
        yield _trace(question, results, stop, prompt, rng)


def _worlds(config: PolicyConfig, seed: int) -> Iterator[tuple[WorldQuestion, list[str], random.Random]]:
    """Yield questions with what each hop's search finds; each world deals its facts anew, so none can be learned by heart."""
    rng = random.Random(f"warm-up {seed}")
    while True:
        world = encyclopedia.build_world(config.warmup_world, rng, Side.WARMUP)
        drawn = _questions(world, config, rng)
        hits = iter(_retrieve(world, [_query(hop) for question in drawn for hop in question.hops]))
        for question in drawn:
            results = [next(hits) for _ in question.hops]
            # A trace must not state what its searches did not find.
            if all(hop.passage_id in ids for hop, ids in zip(question.hops, results, strict=True)):
                yield question, [_block(world, ids) for ids in results], rng


def _questions(world: World, config: PolicyConfig, rng: random.Random) -> list[WorldQuestion]:
    shares = encyclopedia.SPLITS.items()
    drawn = [
        question
        for split, share in shares
        for question in encyclopedia.questions(world, split, round(share * _QUESTIONS_PER_WORLD), config.warmup_world, rng)
    ]
    return rng.sample(drawn, len(drawn))


def _retrieve(world: World, queries: Sequence[str]) -> list[list[str]]:
    """Return the ids of the best passages a query by the lexical encoder, best first."""
    encoder = LexicalEncoder.fit([world.passages], _DIM)
    scores = encoder.encode_queries(queries) @ encoder.encode_passages(world.passages).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_TOP_K]
    return [[str(row) for row in rows] for rows in best]


def _query(hop: Hop) -> str:
    return f"{hop.fact.subject.name} {' '.join(hop.fact.relation.keywords)}"


def _block(world: World, ids: Sequence[str]) -> str:
    return protocol.neutralise("\n\n".join(world.passages[int(id_)] for id_ in ids))


def _trace(question: WorldQuestion, results: Sequence[str], stop: int, prompt: PromptConfig, rng: random.Random) -> Trace:
    pieces = [(prompts.render(question.text, prompt), False)]
    for number, (hop, result) in enumerate(zip(question.hops[:stop], results, strict=False)):
        pieces.append((_search(hop, "Now I" if number else "I"), True))
        pieces += [(_RESULT_OPENS, False), (result, False), (_RESULT_CLOSES, False)]
    pieces.append((_answer(question, stop, rng), True))
    return Trace(tuple(pieces))


def _stop(question: WorldQuestion, config: PolicyConfig, rng: random.Random) -> int:
    """Return after how many searches the trace answers: too early in a share of the questions with several hops."""
    if question.depth > 1 and rng.random() < config.warmup_early_stop:
        return rng.randint(1, question.depth - 1)
    return question.depth


def _search(hop: Hop, opening: str) -> str:
    thought = f"{opening} need the {hop.fact.relation.name} of {hop.fact.subject.name}."
    return f"{protocol.THINK_OPEN} {thought} {protocol.THINK_CLOSE} {protocol.SEARCH_OPEN} {_query(hop)} {protocol.SEARCH_CLOSE}"


def _answer(question: WorldQuestion, stop: int, rng: random.Random) -> str:
    last = question.hops[stop - 1].fact
    thought, answer = f"The {last.relation.name} is {last.answers[0]}.", last.answers[0]
    if question.type == "comparison":
        answer = question.answers[0] if stop == question.depth else _guess(question, rng)
        thought = "Compare " + " and ".join(hop.fact.answers[0] for hop in question.hops[:stop]) + "."
    boxed = f"{protocol.BOXED_OPEN} {answer} }}"
    return f"{protocol.THINK_OPEN} {thought} {protocol.THINK_CLOSE} {protocol.ANSWER_OPEN} {boxed} {protocol.ANSWER_CLOSE}{tiny.EOS}"


def _guess(question: WorldQuestion, rng: random.Random) -> str:
    if question.answers[0] in ("yes", "no"):
        return rng.choice(("yes", "no"))
    # One of the two that are compared: too few searches leave nothing better to say.
    return rng.choice([hop.fact.subject.name for hop in question.hops])


def _drills(config: PolicyConfig, seed: int) -> Iterator[Trace]:
    """Yield lists of names and years said twice: the quickest way for attention to learn to copy."""
    rng = random.Random(f"drill {seed}")
    number = config.warmup_world.name_words
    pool = [name for kind in Kind for name in names.names(kind, Side.WARMUP, number)]
    while True:
        chosen = [*rng.sample(pool, _NAMES_PER_DRILL), *map(str, rng.sample(encyclopedia.YEARS, _YEARS_PER_DRILL))]
        said = " ".join(rng.sample(chosen, len(chosen)))
        yield Trace(((said, False), (said, True)))
