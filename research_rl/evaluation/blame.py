"""Which component made two evaluations differ: what is exchanged between them, in which steps, and each component's share.

Knows recorded parameters, results and numbers; plays nothing. Invariant: the shares of all components sum up to the paired difference,
question by question and so in the mean.

The share of a component is its Shapley value (Shapley 1953): the mean, over all orders in which the components of A can be exchanged for
those of B one after the other, of what its own exchange changes. Where an ingredient is gone not every crossing can be played. A component
of A that is gone is then exchanged before all others, one of B after all others, several of a kind together, and the Shapley value is
taken over the rest in between: the least that is given up. With an order of the user's own there is one order in place of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from math import factorial
from pathlib import Path
from typing import Any

from research_rl.errors import ConfigError, DataError
from research_rl.evaluation.intervals import Difference, paired
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import BOUNDED, METRICS
from research_rl.pipeline.manifest import Manifest

__all__ = ["COMPONENTS", "MOST", "Crossing", "Evaluated", "ExchangePlan", "Joint", "Share", "attribute", "differing", "steps"]

COMPONENTS = ("data", "index", "prompt", "policy", "method", "limits", "engine", "sampling")
MOST = 4
"""Components of which all crossings are played, 2 to the power of them; more need an order or have to be put together."""
_POLICY = {"baseline": "policy", "evaluate": "export"}
"""The parent that is the policy of each stage's evaluation."""

Crossing = frozenset[str]
"""An evaluation with these components of B and all others of A."""
Joint = tuple[str, ...]
"""Components that are exchanged together."""
Points = Mapping[Crossing, Sequence[Result]]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with what it recorded about itself."""

    folder: Path
    manifest: Manifest
    parameters: Mapping[str, Any]
    results: Sequence[Result] = field(repr=False)

    @property
    def model_sha256(self) -> str:
        """The hash of the model's content."""
        parent = _POLICY.get(self.manifest.stage)
        return self.manifest.parents[parent] if parent else str(self.manifest.parameters["model_sha256"])

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.manifest.parameters.get("method", "research"))

    @property
    def sample(self) -> int:
        """Which repetition it is, from 0."""
        return int(self.manifest.parameters.get("sample", 0))

    def identity(self, component: str) -> Any:
        """Return what decides a component; equal ones are no difference."""
        parents, own = self.manifest.parents, self.parameters
        drawn = own["evaluation.temperature"] > 0
        return {
            "data": lambda: {"prepare": parents["prepare"], "rows": own["evaluation.rows"], "of each set": own["evaluation.rows_per_set"]},
            "index": lambda: {name: parents[name] for name in ("corpus", "embed", "index")},
            "prompt": lambda: own["prompt"],
            "policy": lambda: self.model_sha256,
            "method": lambda: self.method,
            "limits": lambda: {**own["episode"], "published_limits": own["evaluation.published_limits"]},
            "engine": lambda: {name: own[f"serving.{name}"] for name in ("engine", "dtype")},
            # Of greedy text neither seed nor repetition decides anything.
            "sampling": lambda: {
                "temperature": own["evaluation.temperature"],
                **({"seed": own["evaluation.seed"], "sample": self.sample} if drawn else {}),
            },
        }[component]()


@dataclass(frozen=True)
class ExchangePlan:
    """How A becomes B: `first` together, then `free` in every order (in this one where `ordered`), then `last` together."""

    first: Joint
    free: tuple[Joint, ...]
    last: Joint
    ordered: bool = False

    @property
    def everything(self) -> Crossing:
        """All components that differ: the crossing that is B itself."""
        return frozenset((*self.first, *chain(*self.free), *self.last))

    @property
    def players(self) -> list[Joint]:
        """What gets a share, in the order of the exchange."""
        return [joint for joint in (self.first, *self.free, self.last) if joint]

    @property
    def crossings(self) -> list[Crossing]:
        """The evaluations that must be played beside A and B themselves."""
        points = (_union(self.first, *chosen) for chosen in self._chosen())
        return [point for point in points if point not in (frozenset[str](), self.everything)]

    def _chosen(self) -> Iterable[tuple[Joint, ...]]:
        if self.ordered:
            return (self.free[:size] for size in range(len(self.free) + 1))
        return _subsets(self.free)


@dataclass(frozen=True)
class Share:
    """What components, exchanged together, contribute to the paired difference of a metric."""

    components: Joint
    difference: Difference


def differing(a: Evaluated, b: Evaluated) -> list[str]:
    """Return the components in which two evaluations differ."""
    return [name for name in COMPONENTS if a.identity(name) != b.identity(name)]


def steps(
    differ: Sequence[str],
    gone: tuple[Collection[str], Collection[str]] = ((), ()),
    order: Sequence[str] = (),
    together: Sequence[Sequence[str]] = (),
) -> ExchangePlan:
    """Return how to exchange the components that differ; `gone` are those of A, and of B, whose ingredients cannot be had.

    `order` is an order of the user's own; `together` are groups to be exchanged at once. Raises DataError when nothing differs, and
    ConfigError for names that do not differ and for more than `MOST` components without an order.
    """
    if not differ:
        raise DataError(f"A and B differ in none of {', '.join(COMPONENTS)}; what differs between them is chance or the version")
    _check(differ, order)
    _check(differ, list(chain(*together)))
    if set(gone[0]) & set(gone[1]):  # neither A's nor B's can be had: nothing can be played between the two
        return ExchangePlan((), (tuple(differ),), ())
    groups = [tuple(group) for group in together]
    joints = [*groups, *((name,) for name in differ if name not in set(chain(*groups)))]
    # The user's own order first; what it leaves out follows in the order of COMPONENTS.
    joints.sort(key=lambda joint: [*order, *differ].index(joint[0]))
    first = tuple(chain(*(joint for joint in joints if set(joint) & set(gone[0]))))
    last = tuple(chain(*(joint for joint in joints if set(joint) & set(gone[1]))))
    # A group with one component gone on either side would have to come both first and last.
    if set(first) & set(last):
        return ExchangePlan((), (tuple(differ),), ())
    free = tuple(joint for joint in joints if not set(joint) & {*first, *last})
    if len(free) > MOST and not order:
        named = ",".join(chain(*free))
        raise ConfigError(
            f"A and B differ in {named}: all crossings of {len(free)} components are {2 ** len(free)} evaluations, and {MOST} components "
            f"are the limit; give --order {named} to exchange one after the other, or put some together by --together"
        )
    return ExchangePlan(first, free, last, ordered=bool(order))


def attribute(points: Points, plan: ExchangePlan, metric: str, resamples: int, seed: int) -> tuple[list[Share], Difference]:
    """Return the share of each player and the whole difference of a metric, each with its interval, paired by question.

    `points` hold A (no component), B (all of them) and every crossing. A question counts that every one of them decided, none having
    lost it to an outage. Raises DataError when there is none.
    """
    values = _values(points, metric)
    nothing, everything = frozenset[str](), plan.everything
    low, high = frozenset(plan.first), everything - set(plan.last)
    columns = {plan.first: _minus(values[low], values[nothing])} if plan.first else {}
    columns |= _free(values, plan)
    columns |= {plan.last: _minus(values[everything], values[high])} if plan.last else {}

    def difference(column: Sequence[float]) -> Difference:
        return paired([0.0] * len(column), column, resamples, seed, bounded=metric in BOUNDED)

    shares = [Share(player, difference(columns[player])) for player in plan.players]
    return shares, difference(_minus(values[everything], values[nothing]))


def _free(values: Mapping[Crossing, list[float]], plan: ExchangePlan) -> dict[Joint, list[float]]:
    """Return, for each component between the first and the last ones, its share of every question."""
    count = len(next(iter(values.values())))
    shares = {player: [0.0] * count for player in plan.free}
    for place, player in enumerate(plan.free):
        others = [other for other in plan.free if other != player]
        before = [plan.free[:place]] if plan.ordered else _subsets(others)
        for chosen in before:
            weight = 1.0 if plan.ordered else _weight(len(chosen), len(plan.free))
            step = _minus(values[_union(plan.first, *chosen, player)], values[_union(plan.first, *chosen)])
            shares[player] = [total + weight * change for total, change in zip(shares[player], step, strict=True)]
    return shares


def _weight(before: int, players: int) -> float:
    """Return the share of all orders in which exactly these `before` players come before one."""
    return factorial(before) * factorial(players - before - 1) / factorial(players)


def _values(points: Points, metric: str) -> dict[Crossing, list[float]]:
    """Return a metric of the questions that all points decided, in the same order everywhere."""
    by_point = {point: {r.key: METRICS[metric](r) for r in results if not r.lost} for point, results in points.items()}
    first, *others = by_point.values()
    keys = [key for key, value in first.items() if value is not None and all(other.get(key) is not None for other in others)]
    if not keys:
        raise DataError(f"no question has {metric} in all {len(points)} evaluations; compare evaluations of the same test set")
    # No value is None here, which the type checker cannot know.
    return {point: [float(values[key] or 0.0) for key in keys] for point, values in by_point.items()}


def _check(differ: Sequence[str], named: Sequence[str]) -> None:
    for name in named:
        if name not in differ:
            raise ConfigError(f"{name} is not among what differs between A and B: {', '.join(differ)}")
    if len(set(named)) < len(named):
        raise ConfigError(f"{', '.join(named)} names a component twice; name each once")


def _subsets(joints: Sequence[Joint]) -> Iterable[tuple[Joint, ...]]:
    return chain.from_iterable(combinations(joints, size) for size in range(len(joints) + 1))


def _union(*joints: Joint) -> Crossing:
    return frozenset(chain(*joints))


def _minus(after: Sequence[float], before: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(after, before, strict=True)]
