"""The plan of a fleet: what it promises is simulated, what it weighs is stated, and what cannot be kept is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.errors import ConfigError
from research_rl.pipeline.stages import Workspace
from research_rl.planning import fleet, search_rates
from research_rl.planning.fleet import Demand, FleetPlan
from research_rl.planning.search_rates import BATCHES, SearchRate
from research_rl.planning.simulation import SimulatedRun


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_QUERIES", 1000)
    monkeypatch.setattr(fleet, "_PLAYED", 3)


def rate(fixed_ms: float, each_us: float, query_ms: float) -> SearchRate:
    """A joint search: some time whatever it holds, some for each row, some for each query."""
    fixed = tuple((fixed_ms + query_ms * batch) / 1000 for batch in BATCHES)
    return SearchRate(fixed, (each_us / 1e6,) * len(BATCHES), (0.9, 1.0, 1.1))


RATES = {"Exact": rate(1, 0.1, 0.5), "RR1024,RaBitQfs": rate(3, 0.004, 0.5)}


def planned(qps: float = 200, p99_ms: float = 100, passages: float = 20e6, **overrides: Any) -> FleetPlan:
    tree = Config(**{"index": {"factory": "auto"}, "retriever": {"memory_gib": 8}, **overrides})
    return fleet.plan(tree, Demand(int(passages), qps, p99_ms), RATES)


def test_it_takes_the_cheapest_fleet_that_keeps_the_latency() -> None:
    found = planned()
    assert found.p50_ms <= found.p99_ms <= found.lost_p99_ms <= 100
    assert found.replicas >= 2 and found.parts * found.rows >= 20e6
    assert found.index.refine, "codes: the exact scan needs a core for each half million passages"
    assert found.memory <= 8 * 1024**3 and found.disk > found.rows * 1024 * 4
    assert found.most_qps * (found.replicas - 1) / found.replicas > 200, "also without one of its replicas"


def test_more_queries_a_shorter_latency_and_less_memory_cost_more() -> None:
    plain = planned().cost_hour
    assert planned(qps=2000).cost_hour > plain
    assert planned(p99_ms=40).cost_hour > plain
    assert planned(passages=80e6).cost_hour > plain
    assert planned(retriever={"memory_gib": 1}).parts > planned().parts


def test_what_no_fleet_keeps_is_refused_with_value_limit_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"p99_ms=5 for 20,000,000 passages .* up to 256 parts .* raise p99_ms or retriever.memory_gib"):
        planned(p99_ms=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["passages=1e9", "qps=5"], "p99_ms is not given; an example: research plan retriever"),
        (["passages=many", "qps=5", "p99_ms=1"], "passages=many is no number above 0"),
        (["passages=.5", "qps=5", "p99_ms=1"], "passages=0.5 is no number above 0"),
        (["passages=.inf", "qps=5", "p99_ms=1"], "passages=inf is no number"),
        (["passages=1e9", "qps=-5", "p99_ms=1"], "qps=-5 is no number"),
        (["passages"], "'passages' is not of the form"),
    ],
)
def test_a_request_that_is_none_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet.asked(words)


def test_a_request_is_read_and_other_parameters_are_passed_on() -> None:
    read, rest = fleet.asked(["passages=1e9", "index.factory=SQ8", "qps=500", "p99_ms=200"])
    assert read == Demand(1_000_000_000, 500.0, 200.0) and rest == ["index.factory=SQ8"]


@pytest.mark.parametrize("overrides", [["index.kind=hybrid"], ["encoder.kind=none"], ["index.prebuilt=x.faiss"]])
def test_what_has_no_vectors_of_its_own_is_not_planned(overrides: list[str], tmp_path: Path) -> None:
    chosen = configuration.load_profile("laptop", overrides)
    with pytest.raises(ConfigError, match=r"index.kind=dense|set encoder.kind"):
        fleet.describe(chosen, Workspace(tmp_path), Demand(1000, 1, 1000))


def test_parts_that_were_not_played_are_taken_as_independent() -> None:
    """Parts that are late by chance in one of 100 answers: of n of them, all are in time in 0.99 ** n."""
    part = [0.1 if n % 100 else 1.0 for n in range(10_000)]
    outcome = SimulatedRun([max(each) for each in zip(part, part, strict=True)], [part, part], 0, 0.5)
    assert fleet.late(outcome, 2, 0.985) == 0.1, "played whole: both are late at once"
    assert fleet.late(outcome, 40, 0.66) == 0.1 and fleet.late(outcome, 40, 0.68) == 1.0, "0.99 ** 40 = 0.669"


def test_a_rate_is_a_straight_line_between_and_beyond_what_was_measured() -> None:
    measured = rate(2, 0.5, 1)
    for queries, rows in ((1, 0), (10, 1000), (64, 1e6), (200, 1e6)):
        assert measured.seconds(queries, rows) == pytest.approx((2 + queries) / 1000 + 0.5e-6 * rows)


def test_the_whole_plan_is_measured_and_says_where_its_rates_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_rates, "_SAMPLE_BYTES", 4 << 20)
    chosen = configuration.load_profile("laptop", ["encoder.dim=64", "index.factory=Exact"])
    text = fleet.describe(chosen, Workspace(tmp_path), Demand(50_000, 2, 5000))
    assert "retriever: 50,000 passages, 2 queries/s, 99 % within 5000 ms with one service lost" in text
    for part in (
        "1 parts x 2 replicas",
        "GiB in all",
        "TB in all",
        "core-hours",
        "measured here, one core of",
        "not measured here: plan.encode",
    ):
        assert part in text
