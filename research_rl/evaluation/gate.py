"""Decide between a challenger and the standing champion from the questions that both have answered. Knows scores and costs of questions;
asks none, moves no alias.

Invariants: (1) a look may be taken after any question, and each rule still errs with probability at most `gate.alpha`;
(2) the outcome is that of the first question after which a rule was met, so it does not depend on when looks were taken;
(3) a question without a value on both sides is in no number but `lost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from research_rl.config import GateConfig
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation.results import Result
from research_rl.evaluation.sequential import NEVER, Values, first_shown, largest_capital, limits
from research_rl.evaluation.summary import METRICS, SCORES

__all__ = ["Decision", "Outcome", "PairedQuestion", "asked", "decide", "looks"]


class Outcome(StrEnum):
    """What follows. All but `promote` leave the champion; `undecided` asks for more questions, if there are any."""

    PROMOTE = "promote"
    REFUSE = "refuse"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class PairedQuestion:
    """A question that both policies were asked: its data source, both scores (0 to 1), and what the challenger needed.

    A score is None where the episode was lost or the metric is not defined for the question.
    """

    data_source: str
    champion: float | None
    challenger: float | None
    searches: float = 0.0
    tokens: float = 0.0

    @property
    def difference(self) -> float | None:
        """Challenger minus champion, None unless both have a score. Raises DataError when a score is not between 0 and 1."""
        if self.champion is None or self.challenger is None:
            return None
        for score in (self.champion, self.challenger):
            if not 0 <= score <= 1:
                raise DataError(
                    f"a question of {self.data_source} has the score {score:g}, the limits are 0 and 1; choose another gate.metric"
                )
        return self.challenger - self.champion


@dataclass(frozen=True)
class Decision:
    """The outcome, why in one sentence, and the numbers behind it, ready for JSON."""

    outcome: Outcome
    reason: str
    evidence: dict[str, Any]


def looks(questions: int, config: GateConfig) -> list[list[int]]:
    """Return the places (0 to questions - 1) of all questions in the order to ask them, in the batches after each of which to look.

    Files are often sorted, by data source or difficulty. The first questions of a file are then no sample of it, and stopping early would
    decide by them alone; in a random order every beginning is a sample. The order is seeded so that a gate can be repeated.
    """
    order: list[int] = np.random.default_rng(config.order_seed).permutation(questions).tolist()
    return [order[start : start + config.batch] for start in range(0, questions, config.batch)]


def asked(champion: Result, challenger: Result, metric: str) -> PairedQuestion:
    """Return one question's results on both sides as the gate reads them. Raises ConfigError for a metric that is no score."""
    if metric not in SCORES:
        raise ConfigError(f"gate.metric={metric!r} is no score between 0 and 1; choose one of {sorted(SCORES)}")
    lost, score = champion.lost or challenger.lost, METRICS[metric]
    return PairedQuestion(
        challenger.data_source,
        None if lost else score(champion),
        None if lost else score(challenger),
        float(challenger.searches),
        float(challenger.tokens),
    )


def decide(pairs: Sequence[PairedQuestion], config: GateConfig) -> Decision:
    """Decide from all questions asked so far, in the order they were asked. Equal arguments give equal decisions.

    Raises DataError when a score is not between 0 and 1.
    """
    weighed = _Weighed.of(pairs, config)
    ends = {Outcome.REFUSE: weighed.refused, Outcome.PROMOTE: weighed.promoted, Outcome.EQUIVALENT: weighed.equivalent}
    outcome = min(ends, key=lambda name: ends[name])  # of two met by the same question the first named counts
    if ends[outcome] > weighed.n:
        return Decision(Outcome.UNDECIDED, weighed.open_reason(), weighed.evidence(None))
    after = int(ends[outcome])
    # Ceilings hold for the questions that decided, so answers that were given beyond them change nothing.
    if outcome is Outcome.PROMOTE and (over := weighed.over_ceiling(after)):
        return Decision(Outcome.REFUSE, f"{weighed.headline()}: a gain is shown, but {over}.", weighed.evidence(after))
    return Decision(outcome, weighed.reason(outcome, after), weighed.evidence(after))


@dataclass(frozen=True)
class _Weighed:
    """Questions with a value on both sides, and after how many of them each rule was met (NEVER: not yet)."""

    config: GateConfig
    pairs: list[PairedQuestion]
    differences: Values
    lost: int
    better: float
    worse: float
    equivalent: float
    holds: dict[str, float]
    falls: dict[str, float]

    @classmethod
    def of(cls, pairs: Sequence[PairedQuestion], config: GateConfig) -> _Weighed:
        both = [(pair, difference) for pair in pairs if (difference := pair.difference) is not None]
        decided, values, alpha = [pair for pair, _ in both], np.array([value for _, value in both], dtype=np.float64), config.alpha
        equivalent = max(first_shown(values, -config.margin, alpha), first_shown(-values, -config.margin, alpha))
        holds, falls = dict[str, float](), dict[str, float]()
        for name, fall in config.must_hold.items():
            places = _places(decided, name)
            holds[name] = _among_all(places, first_shown(values[places], -fall, alpha))
            falls[name] = _among_all(places, first_shown(-values[places], fall, alpha))
        # A gain has to exceed `min_gain`, while any fall at all refuses.
        better, worse = first_shown(values, config.min_gain, alpha), first_shown(-values, 0.0, alpha)
        return cls(config, decided, values, len(pairs) - len(decided), float(better), float(worse), float(equivalent), holds, falls)

    @property
    def n(self) -> int:
        return len(self.pairs)

    @property
    def promoted(self) -> float:
        # All of them must be shown, so a wrong promotion needs at least one wrong proof: alpha needs no share for each.
        return max(self.better, self.config.min_questions, *self.holds.values())

    @property
    def refused(self) -> float:
        # NEVER stands for the rules of a gate without `must_hold`: `min` takes no single number.
        return min(self.worse, *self.falls.values(), NEVER)

    def over_ceiling(self, after: int) -> str:
        """Return which means over the first `after` questions exceed their ceilings, empty when none does."""
        return " and ".join(
            f"{mean:g} {name} a question exceed gate.max_mean_{name}={ceiling:g}"
            for name, (mean, ceiling) in self.costs(after).items()
            if ceiling is not None and mean > ceiling
        )

    def costs(self, after: int) -> dict[str, tuple[float, float | None]]:
        """Return the challenger's means over the first `after` questions, each with its ceiling."""
        first, config = self.pairs[:after], self.config
        return {
            "searches": (_mean([pair.searches for pair in first]), config.max_mean_searches),
            "tokens": (_mean([pair.tokens for pair in first]), config.max_mean_tokens),
        }

    def headline(self) -> str:
        return _moved(self.config.metric, self.differences, self.config.alpha)

    def reason(self, outcome: Outcome, after: int) -> str:
        """Return why a rule was met after `after` questions."""
        config = self.config
        if outcome is Outcome.PROMOTE:
            held = f", and {', '.join(config.must_hold)} held" if config.must_hold else ""
            return f"{self.headline()}: a gain above {config.min_gain:g} was shown after {after} questions{held}."
        if outcome is Outcome.EQUIVALENT:
            return f"{self.headline()}: a difference smaller than gate.margin={config.margin:g} was shown after {after} questions."
        if self.worse <= after:
            return f"{self.headline()}: a fall was shown after {after} questions."
        name = min(self.falls, key=lambda name: self.falls[name])
        moved = _moved(f"{config.metric} of {name}", self.differences[_places(self.pairs, name)], config.alpha)
        return f"{moved}: a fall of more than the tolerated {config.must_hold[name]:g} was shown after {after} questions."

    def open_reason(self) -> str:
        """Return what is missing for a decision."""
        config = self.config
        if not self.n:
            return f"No question has a score on both sides ({self.lost} lost), so nothing is shown."
        if self.better > self.n:
            sought = f"a gain above {config.min_gain:g}, nor a fall, nor a difference smaller than {config.margin:g}"
            return f"{self.headline()}: neither {sought} is shown."
        missing = [f"gate.min_questions={config.min_questions} is not reached"] if self.n < config.min_questions else []
        missing += [
            f"{name} is not yet shown to fall by less than {config.must_hold[name]:g}" for name, when in self.holds.items() if when > self.n
        ]
        return f"{self.headline()}: a gain above {config.min_gain:g} is shown, but {' and '.join(missing)}."

    def evidence(self, after: int | None) -> dict[str, Any]:
        """Return the numbers over all questions so far; the ceilings' means are those over the questions that decided."""
        values, config = self.differences, self.config
        return {
            "metric": config.metric,
            "alpha": config.alpha,
            "min_gain": config.min_gain,
            "margin": config.margin,
            "lost": self.lost,
            "decided_after": after,
            **_numbers(values, config.alpha),
            "e_gain": _short(largest_capital(values, config.min_gain)),
            "e_fall": _short(largest_capital(-values, 0.0)),
            "sets": {name: self._of_set(name) for name in sorted({*config.must_hold, *(pair.data_source for pair in self.pairs)})},
            "ceilings": {
                name: {"mean": round(mean, 6), "ceiling": ceiling}
                for name, (mean, ceiling) in self.costs(self.n if after is None else after).items()
            },
        }

    def _of_set(self, name: str) -> dict[str, float | int]:
        values, tolerated = self.differences[_places(self.pairs, name)], self.config.must_hold.get(name)
        numbers = _numbers(values, self.config.alpha)
        if tolerated is None:
            return numbers
        held, fallen = largest_capital(values, -tolerated), largest_capital(-values, tolerated)
        return {**numbers, "tolerated_fall": tolerated, "e_holds": _short(held), "e_falls": _short(fallen)}


def _places(pairs: Sequence[PairedQuestion], data_source: str) -> list[int]:
    return [place for place, pair in enumerate(pairs) if pair.data_source == data_source]


def _among_all(places: list[int], count: float) -> float:
    """Turn a number of questions of one set into the number of all questions asked by then."""
    return NEVER if count == NEVER else places[int(count) - 1] + 1


def _numbers(values: Values, alpha: float) -> dict[str, float | int]:
    low, high = limits(values, alpha)
    return {"n": len(values), "mean": round(_mean(values.tolist()), 6), "low": round(low, 6), "high": round(high, 6)}


def _moved(what: str, values: Values, alpha: float) -> str:
    low, high = limits(values, alpha)
    return f"{what} moved by {_mean(values.tolist()):+.4f} on average over {len(values)} questions ({low:+.4f} to {high:+.4f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _short(value: float) -> float:
    return float(f"{value:.6g}")
