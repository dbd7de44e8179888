"""P10: reward and metrics of finished episodes (repository rule, EM, F1, sub-EM) against the published scoring, one thread.

Groups of rollouts answer questions drawn with repetition, as in training. Before the race both sides score all pairs alike; the
pairs leave out the documented divergences (tags in passages, the assistant's delimiter within a response).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.duel import Duel, alternate, rate
from benchmarks.peers import published_scoring as peer
from research_rl.episode.trajectory import Author, Segment, Trajectory
from research_rl.reward import metrics
from research_rl.reward.metrics import cover_em, unreachable
from research_rl.reward.rules import grade

PAIRS, GROUP, EOS = 10_000, 5, "<|im_end|>"
PROMPT = "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n"
WORDS = [
    *("the", "Velmora", "river", "of", "Osk", "in", "an", "Ilva", "Brandt", "1812", "north", "U.S.", "Saint-Denis"),
    *("yes", "no", "county", "É", "a", "town,", "museum", "(old)", "Łódź"),
]


@dataclass(frozen=True)
class Pair:
    """One finished episode and its gold answers; `conversation` is what the published code is given."""

    trajectory: Trajectory
    conversation: str
    golds: tuple[str, ...]


def run(quick: bool) -> Iterator[Duel]:
    """Yield the duel; raises AssertionError when a score differs."""
    pairs = _pairs(random.Random(0))
    for pair in pairs:
        mine, others = _ours(pair), _theirs(pair)
        assert all(abs(a - b) < 1e-12 for a, b in zip(mine, others, strict=True)), (pair.conversation, pair.golds, mine, others)
    seconds, rounds = (0.5, 3) if quick else (2.0, 7)

    def cold() -> int:
        metrics._remembered.cache_clear()  # no answer may profit from an earlier pass over the same pairs
        return sum(len(_ours(pair)) > 0 for pair in pairs)

    def ours() -> float:
        return rate(cold, seconds)

    def theirs() -> float:
        return rate(lambda: sum(len(_theirs(pair)) > 0 for pair in pairs), seconds)

    yield alternate("P10", f"reward and metrics, {PAIRS:,} equal pairs", "answers per CPU-second", ours, theirs, 2.0, rounds)


def _ours(pair: Pair) -> tuple[float, float, float, float]:
    found = grade(pair.trajectory, pair.golds, "repository", EOS)
    return found.score, found.em, found.f1, cover_em(found.prediction, pair.golds)


def _theirs(pair: Pair) -> tuple[float, float, float, float]:
    return peer.reward(pair.conversation, pair.golds, EOS), *peer.evaluate(pair.conversation[len(PROMPT) :], pair.golds)


def _pairs(chance: random.Random) -> list[Pair]:
    def words(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))

    drawn = [tuple(words(4) for _ in range(chance.randint(1, 3))) for _ in range(1000)]
    # A gold answer that normalises to nothing is paid by the published code for whatever is said, and never by ours.
    questions = [golds for golds in drawn if not unreachable(golds)]
    pairs: list[Pair] = []
    while len(pairs) < PAIRS:
        golds = chance.choice(questions)
        pairs += [_pair(chance, golds, words) for _ in range(GROUP)]
    return pairs


def _pair(chance: random.Random, golds: tuple[str, ...], say: Callable[[int], str]) -> Pair:
    segments: list[Segment] = []
    for _ in range(chance.randint(0, 4)):
        segments.append(_segment(Author.MODEL, f"<think> {say(40)} </think> <search> {say(8)} </search>"))
        passages = "\n\n".join(f'"{say(3)}"\n{say(100)}' for _ in range(3))
        segments.append(_segment(Author.SEARCH, f" <result>\n{passages}\n</result>"))
    said = chance.choice([golds[0], say(6), f"{golds[0]} {say(2)}"])
    box = chance.choice(["\\boxed{%s}"] * 8 + ["%s", "\\boxed{{%s}}", "\\boxed{no} or \\boxed{%s}"])
    last = chance.choice(
        [f" <think> {say(30)} </think> <answer> The answer is \\[ {box % said} \\] </answer>"] * 9 + [f" <think> {say(9)}"]
    )
    ended = chance.random() < 0.95
    segments.append(_segment(Author.MODEL, last + EOS * ended))
    trajectory = Trajectory((), segments, ended_by_eos=ended)
    return Pair(trajectory, PROMPT + trajectory.text, golds)


def _segment(author: Author, text: str) -> Segment:
    return Segment(author, (), (), text)
