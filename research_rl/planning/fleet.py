"""How many retrievers a corpus needs: parts, replicas, memory, disk, encoding and cost, for a rate of queries and a latency.

Knows sizes, rates and prices; leaves the latency to `simulation` and the seconds of a search to `search_rates`. What is promised holds with
one replica lost. A fleet of more than `_PLAYED` parts is not played whole: its latency is that of parts that are late
independently of each other, which is no less than that of parts that get the same queries at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from research_rl.config import Config, IndexConfig, assignment
from research_rl.errors import ConfigError
from research_rl.pipeline.stages import Workspace
from research_rl.planning import calibrate
from research_rl.planning.knowledge import CHARS
from research_rl.planning.simulation import Fleet, SimulatedRun, poisson, simulate

if TYPE_CHECKING:
    from research_rl.planning.search_rates import SearchRate

__all__ = ["Demand", "FleetPlan", "asked", "describe", "late", "plan"]

_GIB = 1024**3
_QUANTILE = 0.99
_PLAYED, _QUERIES, _WARM_UP = 6, 5000, 0.1
"""Parts and queries of a simulation, and the share of queries at its beginning that does not count."""
_MOST_PARTS = 256
"""More than the simulated answers of a part can say anything about."""
_STEP = 1.25
"""Between the numbers of parts that are tried."""
_BUSY = 0.85
"""Share of its time that a replica may search once another is lost; above it every burst is felt for long."""
_TRIES = 10
_HOURS = 730
"""Hours of a month."""


@dataclass(frozen=True)
class Demand:
    """What a fleet is for: passages, queries a second, and milliseconds within which 99 of 100 are answered."""

    passages: int
    qps: float
    p99_ms: float


@dataclass(frozen=True)
class FleetPlan:
    """A fleet: its index, how it is cut, what one service holds, and the milliseconds that were simulated."""

    index: IndexConfig
    parts: int
    replicas: int
    rows: int
    memory: float
    disk: float
    cost_hour: float
    p50_ms: float
    p99_ms: float
    lost_p99_ms: float
    hedged: float
    most_qps: float

    @property
    def services(self) -> int:
        """All services."""
        return self.parts * self.replicas


@dataclass(frozen=True)
class _Candidate:
    cost: float
    parts: int
    replicas: int
    index: IndexConfig
    rate: SearchRate


def asked(words: Sequence[str]) -> tuple[Demand, list[str]]:
    """Read `passages=1e9 qps=500 p99_ms=200`; the rest are overrides of the configuration. Raises ConfigError."""
    values: dict[str, float] = {}
    rest: list[str] = []
    for word in words:
        name, value = assignment(word)
        if name not in Demand.__dataclass_fields__:
            rest.append(word)
            continue
        values[name] = _positive(name, value)
    if missing := [name for name in Demand.__dataclass_fields__ if name not in values]:
        raise ConfigError(f"{', '.join(missing)} is not given; an example: research plan retriever passages=1e9 qps=500 p99_ms=200")
    return Demand(int(values["passages"]), values["qps"], values["p99_ms"]), rest


def _positive(name: str, value: object) -> float:
    # YAML reads 1e9 without a dot as a text.
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    least, most = (1, 1e13) if name == "passages" else (0, 1e9)
    if not (number >= least and 0 < number <= most):
        raise ConfigError(f"{name}={str(value)[:40]} is no number above 0 and up to {most:g}; an example: {name}=500")
    return number


def plan(config: Config, demand: Demand, rates: dict[str, SearchRate]) -> FleetPlan:
    """Return the cheapest fleet that keeps the latency with a replica lost; `rates` by index.factory, encoding included.

    Raises ConfigError when none does.
    """
    candidates = sorted(_candidates(config, demand, rates), key=lambda candidate: candidate.cost)[:_TRIES]
    best = math.inf
    for candidate in candidates:
        lost = 1000 * late(_played(config, demand, candidate, 0.0), candidate.parts, _QUANTILE)
        if lost <= demand.p99_ms:
            return _settled(config, demand, candidate, lost)
        best = min(best, lost)
    reached = f"the {len(candidates)} cheapest that may do come to {best:,.0f} ms" if candidates else "none comes near"
    raise ConfigError(
        f"p99_ms={demand.p99_ms:g} for {demand.passages:,} passages and {demand.qps:g} q/s is kept by no fleet of up to {_MOST_PARTS} "
        f"parts of retriever.memory_gib={config.retriever.memory_gib:g} ({reached}); raise p99_ms or retriever.memory_gib, or choose a "
        "coarser index.factory"
    )


def _candidates(config: Config, demand: Demand, rates: dict[str, SearchRate]) -> list[_Candidate]:
    candidates: list[_Candidate] = []
    for index in choices(config):
        rate, fixed, row = rates[index.factory], *_held(config, index)
        room = config.retriever.memory_gib * _GIB - fixed
        # Inverted lists that are mapped take no memory of their own: one part may hold all.
        parts = 1 if not row else math.ceil(demand.passages * row / room) if room > 0 else _MOST_PARTS + 1
        while parts <= min(_MOST_PARTS, demand.passages):
            rows = math.ceil(demand.passages / parts)
            candidates += [
                _Candidate(parts * replicas * _price(config, fixed + row * rows), parts, replicas, index, rate)
                for replicas in _replicas(config, demand, rate, rows)
            ]
            parts = max(parts + 1, int(parts * _STEP))
    return candidates


def choices(config: Config) -> list[IndexConfig]:
    """Return the indexes that are weighed: that of the configuration; for factory=auto the exact scan and one-bit codes with vectors."""
    from research_rl.index import auto

    if config.index.factory != auto.AUTO:
        return [auto.settled(config.index, config.encoder, 0.0, 0, 0)]
    dim = calibrate.width(config.encoder)
    exact = auto.settled(config.index, config.encoder, math.inf, dim, 1)
    codes = auto.settled(config.index.model_copy(update={"refine": True}), config.encoder, math.inf, dim, 1)
    return [exact, codes] if exact != codes else [codes]


def _replicas(config: Config, demand: Demand, rate: SearchRate, rows: int) -> list[int]:
    """Return numbers of replicas that may do: enough to bear all queries without one of them, and usually in time."""
    may: list[int] = []
    for alive in range(1, 65):
        size = _usual_batch(rate, rows, demand.qps / alive, config.retriever.max_batch)
        if size is None:
            continue
        # The latest queries wait for nearly all of the search under way, and then for their own.
        if 2000 * rate.seconds(size, rows) + config.plan.request_ms <= demand.p99_ms:
            may.append(alive + 1)
            if len(may) == 3:
                break
    return may


def _usual_batch(rate: SearchRate, rows: int, qps: float, most: int) -> int | None:
    """Return how many queries come, at `qps`, while so many are searched; None when more come than can be searched."""
    size = 1
    while qps * rate.seconds(size, rows) > _BUSY * size:
        size = max(size + 1, int(size * 1.2))
        if size > most:
            return None
    return size


def _held(config: Config, index: IndexConfig) -> tuple[float, float]:
    """Return the bytes of memory of a service without a row, and those of each row."""
    from research_rl.index import budget

    dim = calibrate.width(config.encoder)
    fixed, with_million = (budget.served(index, config.encoder, dim, rows) for rows in (0, 1_000_000))
    return fixed, (with_million - fixed) / 1e6


def _price(config: Config, memory: float) -> float:
    return config.plan.price_per_core_hour + math.ceil(memory / _GIB) * config.plan.price_per_memory_gib_hour


def _played(config: Config, demand: Demand, candidate: _Candidate, lost: float | None) -> SimulatedRun:
    """Simulate a fleet, with a replica lost from that share of the queries on."""
    service = candidate.rate.service(math.ceil(demand.passages / candidate.parts))
    played, seconds = min(candidate.parts, _PLAYED), config.plan.request_ms / 1000
    fleet = Fleet(played, candidate.replicas, service, config.retriever.max_batch, request_s=seconds, lost=lost)
    return simulate(fleet, poisson(demand.qps, _QUERIES))


def _settled(config: Config, demand: Demand, candidate: _Candidate, lost_p99_ms: float) -> FleetPlan:
    """Return the plan of a fleet that keeps the latency."""
    from research_rl.index.dense import row_bytes
    from research_rl.index.search import EXACT

    index, dim, parts = candidate.index, calibrate.width(config.encoder), candidate.parts
    rows, (fixed, row) = math.ceil(demand.passages / parts), _held(config, index)
    whole = _played(config, demand, candidate, None)
    # Full vectors are read where candidates are compared by them; the exact scan does so, too.
    vectors = 4 * dim if index.refine or index.factory == EXACT else 0
    return FleetPlan(
        index=index,
        parts=parts,
        replicas=candidate.replicas,
        rows=rows,
        memory=fixed + row * rows,
        disk=rows * (CHARS + 16 + row_bytes(index, dim) + vectors),
        cost_hour=candidate.cost,
        p50_ms=1000 * late(whole, parts, 0.5),
        p99_ms=1000 * late(whole, parts, _QUANTILE),
        lost_p99_ms=lost_p99_ms,
        hedged=whole.hedges / (_QUERIES * len(whole.of_parts)),
        # A service that always searches is not at its limit: it takes more queries at once.
        most_qps=candidate.replicas * max(size / candidate.rate.seconds(size, rows) for size in range(1, config.retriever.max_batch + 1)),
    )


def late(outcome: SimulatedRun, parts: int, quantile: float) -> float:
    """Return the seconds within which that share of queries is answered by all of `parts`, of which the first ones were played."""
    begin = int(_WARM_UP * len(outcome.latencies))
    if parts <= len(outcome.of_parts):
        return sorted(outcome.latencies[begin:])[int(quantile * (len(outcome.latencies) - begin))]
    first, others = sorted(outcome.of_parts[0][begin:]), sorted(seconds for part in outcome.of_parts[1:] for seconds in part[begin:])
    return _slowest(first, others, parts - 1, quantile)


def _slowest(first: Sequence[float], others: Sequence[float], many: int, quantile: float) -> float:
    """Return the quantile of the greatest of one draw of `first` and `many` of `others`, all ascending."""
    from bisect import bisect_right

    def below(seconds: float) -> float:
        return bisect_right(first, seconds) / len(first) * (bisect_right(others, seconds) / len(others)) ** many

    values = sorted({*first, *others})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if below(values[middle]) >= quantile else (middle + 1, high)
    return values[low]


def describe(config: Config, workspace: Workspace, demand: Demand) -> str:
    """Measure, plan, and return the plan as text. Raises ConfigError for what cannot be planned or kept."""
    from research_rl.planning import search_rates

    _plannable(config)
    texts = calibrate.texts(workspace)
    encoded, source = search_rates.encoding(config, texts)
    dim = calibrate.width(config.encoder)
    rates = {index.factory: search_rates.joined(encoded, search_rates.index(index, dim)) for index in choices(config)}
    fleet = plan(config, demand, rates)
    return "\n".join(
        [*_fleet_lines(config, demand, fleet), *_encoding_lines(config, demand, texts), *_rate_lines(config, fleet, rates, source)]
    )


def _plannable(config: Config) -> None:
    if config.index.kind != "dense" or config.index.prebuilt:
        made = "index.prebuilt" if config.index.prebuilt else f"index.kind={config.index.kind}"
        raise ConfigError(f"a fleet is planned for vectors only, not for {made}; set index.kind=dense and clear index.prebuilt")
    if config.encoder.kind == "none":
        raise ConfigError("a fleet of vectors needs an encoder, but encoder.kind=none; set encoder.kind")


def _fleet_lines(config: Config, demand: Demand, fleet: FleetPlan) -> list[str]:
    index = fleet.index
    refined = f", best {index.candidates} rows compared by their vectors" if index.refine else ""
    way = "played whole" if fleet.parts <= _PLAYED else f"{_PLAYED} parts played, {fleet.parts} reckoned as independent"
    month = _HOURS * fleet.cost_hour
    return [
        f"retriever: {demand.passages:,} passages, {demand.qps:g} queries/s, 99 % within {demand.p99_ms:g} ms with one service lost",
        f"index: {index.factory}{refined}, vectors of {calibrate.width(config.encoder)}",
        f"fleet: {fleet.parts} parts x {fleet.replicas} replicas = {fleet.services} services of one core, {fleet.rows:,} passages each",
        f"memory: {fleet.memory / _GIB:,.1f} GiB a service (retriever.memory_gib={config.retriever.memory_gib:g}), "
        f"{fleet.services * fleet.memory / _GIB:,.0f} GiB in all",
        f"disk: {fleet.disk / 1e9:,.1f} GB a service, {fleet.services * fleet.disk / 1e12:,.2f} TB in all",
        f"latency, simulated ({way}): median {fleet.p50_ms:,.0f} ms, 99 % {fleet.p99_ms:,.0f} ms; one service lost: 99 % "
        f"{fleet.lost_p99_ms:,.0f} ms; {fleet.hedged:.1%} of requests sent twice; at most {fleet.most_qps:,.0f} queries/s",
        f"clients: {fleet.parts * demand.qps:,.0f} requests/s in all; what they take at the clients is not reckoned",
        f"services cost {month:,.0f} a month at {config.plan.price_per_core_hour:g} a core-hour and "
        f"{config.plan.price_per_memory_gib_hour:g} a GiB-hour",
    ]


def _encoding_lines(config: Config, demand: Demand, texts: list[str]) -> list[str]:
    if calibrate.known(config.encoder):
        hours = demand.passages * calibrate.operations(config.encoder) / (config.plan.encode_tflops * 1e12) / 3600
        cost = hours * config.plan.price_per_gpu_hour
        return [
            f"encoding: {hours:,.1f} GPU-hours, {cost:,.0f} at {config.plan.price_per_gpu_hour:g} a GPU-hour "
            f"(from plan.encode_tflops={config.plan.encode_tflops:g})"
        ]
    hours = demand.passages * calibrate.measure("embed", config, texts) / 3600
    cost = hours * config.plan.price_per_core_hour
    return [f"encoding: {hours:,.1f} core-hours, {cost:,.1f} at {config.plan.price_per_core_hour:g} a core-hour (measured here)"]


def _rate_lines(config: Config, fleet: FleetPlan, rates: dict[str, SearchRate], source: str) -> list[str]:
    rate = rates[fleet.index.factory]
    times = ", ".join(f"{1000 * rate.seconds(size, fleet.rows):,.1f} ms for {size}" for size in (1, 16, 64))
    reranker = "" if config.reranker.kind == "none" else "; the reranker's time is not in it: rerank_ms of the index card says what it is"
    return [
        f"measured here, one core of {calibrate.machine()}: a joint search of one service, {times} queries, drawn on in a straight line "
        f"from a smaller index whose vectors lie in memory; {source}{reranker}",
        "not measured here: plan.encode_tflops (docs/experiments.md), plan.request_ms and prices (assumptions of the section plan)",
    ]
