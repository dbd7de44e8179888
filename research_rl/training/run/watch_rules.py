"""What the collapse watch measures: one rule a name of `watch` in the configuration. Knows numbers; knows no steps, no files.

A rule whose metric is not there measures None. A measure reads the rows up to a step and the rule's window.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["NOT_FINITE", "RULES", "SOLVED", "Rows", "Rule"]

NOT_FINITE = "not_finite/"
"""Prefix of the metrics that say which of verl's numbers was NaN or infinite."""
SOLVED = 0.95
"""Mean F1 from which rollouts that all earn the same are a success, not a loss of signal."""

Rows = Sequence[Mapping[str, float]]
Measure = Callable[[Rows, int], float | None]


@dataclass(frozen=True)
class Rule:
    """What is measured, on which side of its limit it is in breach, and what helps."""

    measure: Measure
    breach: Literal["above", "below"]
    text: str
    remedy: str

    def breached(self, value: float, limit: float) -> bool:
        """Whether `value` lies on the wrong side of `limit`."""
        return value > limit if self.breach == "above" else value < limit


def _known(rows: Rows, name: str) -> list[float]:
    """Return a metric's values where it is there; `a|b` takes the first of two names that is."""
    return [values[0] for row in rows if (values := [row[part] for part in name.split("|") if part in row])]


def _mean(rows: Rows, name: str) -> float | None:
    values = _known(rows, name)
    return statistics.fmean(values) if values else None


def _level(name: str, *, magnitude: bool = False) -> Measure:
    """Mean over the last window."""

    def measure(rows: Rows, window: int) -> float | None:
        value = _mean(rows[-window:], name)
        return abs(value) if magnitude and value is not None else value

    return measure


def _sum(*names: str) -> Measure:
    """Mean over the last window of a sum of metrics."""

    def measure(rows: Rows, window: int) -> float | None:
        parts = [_mean(rows[-window:], name) for name in names]
        known = [part for part in parts if part is not None]
        return sum(known) if known else None

    return measure


def _of_best(name: str, floor: float) -> Measure:
    """Mean over the last window as a share of the best earlier window; silent while that one is below `floor`."""

    def measure(rows: Rows, window: int) -> float | None:
        known = _known(rows, name)
        # Windows without a step of the last one, which must not be compared with itself.
        means = [statistics.fmean(known[end - window : end]) for end in range(window, len(known) - window + 1)]
        best = max(means, default=0.0)
        return statistics.fmean(known[-window:]) / best if best >= floor else None

    return measure


def _of_start(name: str) -> Measure:
    """Mean over the last window as a multiple of the first window's."""

    def measure(rows: Rows, window: int) -> float | None:
        known = _known(rows, name)
        # Two windows at least, so that the first and the last have no step in common.
        first = statistics.fmean(known[:window]) if len(known) >= 2 * window else 0.0
        return statistics.fmean(known[-window:]) / first if first > 0 else None

    return measure


def _over_start(name: str) -> Measure:
    """Mean over the last window less the first window's."""

    def measure(rows: Rows, window: int) -> float | None:
        known = _known(rows, name)
        return statistics.fmean(known[-window:]) - statistics.fmean(known[:window]) if len(known) >= 2 * window else None

    return measure


def _of_median(name: str) -> Measure:
    """Mean over the last window as a multiple of the median of all earlier steps."""

    def measure(rows: Rows, window: int) -> float | None:
        known = _known(rows, name)
        usual = statistics.median(known[:-window]) if len(known) >= 2 * window else 0.0
        return statistics.fmean(known[-window:]) / usual if usual > 0 else None

    return measure


def _unless_solved(measure: Measure) -> Measure:
    """Silent while nearly every answer is right: then equal rewards are the goal."""

    def guarded(rows: Rows, window: int) -> float | None:
        f1 = _mean(rows[-window:], "episode/f1")
        return None if f1 is not None and f1 >= SOLVED else measure(rows, window)

    return guarded


def _count_not_finite(rows: Rows, window: int) -> float | None:
    return float(sum(name.startswith(NOT_FINITE) for name in rows[-1]))


_LR = "lower train.lr, or keep the policy near the reference model by train.kl_coef"
_PAY = "or reward intermediate results (reward.terms)"
_REWARD = "look at episode/reward/* and at the trajectories: the reward may be earned by something else than answers"
_COST = "penalise length (a reward term of kind length with a negative weight)"
_ENTROPY = "actor/entropy|actor/entropy_loss"  # the second where old log-probabilities come from the rollout
_TOKENS = "episode/model_tokens"
_STOP = "episode/stop/"
_CUT = (f"{_STOP}token_limit", f"{_STOP}time_limit", f"{_STOP}search_limit")

RULES: dict[str, Rule] = {
    "nan": Rule(
        _count_not_finite,
        "above",
        "number of the update's metrics that are not finite",
        f"{_LR}; in bfloat16 check for overflow",
    ),
    "reward_drop": Rule(
        _of_best("episode/reward", 0.05),
        "below",
        "reward as a share of its best",
        f"{_LR}; {_REWARD}",
    ),
    "reward_spread": Rule(
        _unless_solved(_level("episode/reward_std")),
        "below",
        "standard deviation of the reward within a step",
        f"ease the questions, raise train.temperature, {_PAY}",
    ),
    "no_signal": Rule(
        _level("episode/flat_groups"),
        "above",
        "share of groups whose rollouts all earn the same without being right",
        f"raise train.rollouts_per_prompt or train.temperature, mix in easier questions, set train.filter_groups.enabled=true, {_PAY}",
    ),
    "entropy_low": Rule(
        _of_start(_ENTROPY),
        "below",
        "entropy as a share of its start",
        f"the policy has stopped exploring: {_LR}, or raise train.entropy_coef",
    ),
    "entropy_high": Rule(
        _over_start(_ENTROPY),
        "above",
        "entropy over its start, in nats per token,",
        f"the policy samples ever more at random: {_LR}, or lower train.entropy_coef",
    ),
    "kl_reference": Rule(
        _level("actor/kl_loss"),
        "above",
        "KL against the reference model, in nats per token,",
        "raise train.kl_coef or lower train.lr",
    ),
    "kl_step": Rule(
        _level("actor/ppo_kl", magnitude=True),
        "above",
        "KL of one update, in nats per token,",
        "lower train.lr, or make fewer updates a step (train.mini_batch); with one update a step it is the engine's gap to the trainer",
    ),
    "grad_norm": Rule(
        _of_median("actor/grad_norm"),
        "above",
        "gradient norm as a multiple of its median so far",
        _LR,
    ),
    "response_short": Rule(
        _of_start(_TOKENS),
        "below",
        "tokens written per episode as a share of their start",
        f"{_REWARD}; {_LR}",
    ),
    "response_long": Rule(
        _of_start(_TOKENS),
        "above",
        "tokens written per episode as a multiple of their start",
        f"{_REWARD}; {_COST}",
    ),
    "searches": Rule(
        _of_best("episode/searches", 0.2),
        "below",
        "searches per episode as a share of their best",
        "look at episode/empty_searches and episode/failed_searches, or reward what is found (a reward term of kind retrieval)",
    ),
    "answered": Rule(
        _of_best(f"{_STOP}answered", 0.1),
        "below",
        "share of episodes that end with an answer, against its best,",
        f"{_LR}; {_REWARD}",
    ),
    "cut_off": Rule(
        _sum(*_CUT),
        "above",
        "share of episodes cut off by a limit of tokens, time or searches",
        f"see which of episode/stop/* grows and raise that limit of episode, or {_COST}",
    ),
    "throughput": Rule(
        _of_median("perf/throughput"),
        "below",
        "tokens per second as a share of their median so far",
        "see what else uses the machine, and whether the retriever has become slow (episode/search_s)",
    ),
    "probability_gap": Rule(
        _level("training/rollout_probs_diff_mean"),
        "above",
        "mean gap of token probabilities between rollout engine and trainer",
        "rollouts come from other weights or number formats than the update assumes: compare dtypes and versions of engine and trainer",
    ),
    "empty_searches": Rule(
        _level("episode/empty_searches"),
        "above",
        "share of answered searches that brought no passage text",
        "the retriever answers with nothing: check corpus and index behind it with a query by hand",
    ),
    "suspect": Rule(
        _level("episode/suspect"),
        "above",
        "share of answers that show a sign of reward hacking",
        "set reward.strict.enabled=true, so that they earn nothing",
    ),
}
