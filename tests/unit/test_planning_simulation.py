"""The simulation of a fleet against exact formulas: queues, the slowest of several parts, second requests, a lost replica."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from research_rl.planning.simulation import Fleet, Service, SimulatedRun, poisson, simulate

RATE = 10.0
"""Searches a second of one replica."""
MANY = 60_000


def exponential(batch: int, draw: random.Random) -> float:
    return draw.expovariate(RATE)


def constant(batch: int, draw: random.Random) -> float:
    return 1 / RATE


def erlang_c(servers: int, load: float) -> float:
    """The chance of having to wait in M/M/c at `load` = arrivals over the rate of one server (Erlang 1917)."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**n / math.factorial(n) for n in range(servers)) + last)


def share(seconds: list[float], quantile: float) -> float:
    return sorted(seconds)[int(quantile * len(seconds))]


def on_shared_cores(service: Service, cores: int, load: float) -> list[SimulatedRun]:
    fleet = Fleet(1, 40, service, hedge=False, cores=cores)
    return [simulate(fleet, poisson(load * RATE, MANY // 3, seed=seed), seed) for seed in range(5)]


@pytest.mark.parametrize("service", [exponential, constant])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_core_that_is_shared_in_turns_makes_all_searches_longer_alike(service: Service, load: float) -> None:
    """One core, a replica a search: M/G/1 with processor sharing has one mean for all laws (Kleinrock 1967)."""
    outcomes = on_shared_cores(service, 1, load)
    taken = statistics.fmean(statistics.fmean(outcome.latencies) for outcome in outcomes)
    assert taken == pytest.approx(1 / RATE / (1 - load), rel=0.08)
    assert statistics.fmean(outcome.busy * 40 for outcome in outcomes) == pytest.approx(load, rel=0.03)


@pytest.mark.parametrize(("servers", "load"), [(2, 1.4), (4, 3.0)])
def test_several_cores_are_shared_as_m_m_c_says(servers: int, load: float) -> None:
    """With exponential times the number of searches under way is that of M/M/c, in whichever order they are served."""
    outcomes = on_shared_cores(exponential, servers, load)
    waited = statistics.fmean(statistics.fmean(outcome.latencies) for outcome in outcomes) - 1 / RATE
    assert waited == pytest.approx(erlang_c(servers, load) / (servers * RATE - load * RATE), rel=0.08)
    assert statistics.fmean(outcome.busy * 40 for outcome in outcomes) == pytest.approx(load, rel=0.03)


def test_one_replica_one_query_at_a_time_is_m_m_1_to_the_quantile() -> None:
    """The time in M/M/1 is exponential with the rate that is left over."""
    outcome = simulate(Fleet(1, 1, exponential, max_batch=1), poisson(6.0, MANY, seed=3), seed=4)
    for quantile in (0.5, 0.95, 0.99):
        assert share(outcome.latencies, quantile) == pytest.approx(-math.log(1 - quantile) / (RATE - 6.0), rel=0.08)


def test_searches_of_equal_length_wait_half_as_long() -> None:
    """Pollaczek and Khinchine for M/D/1."""
    outcome = simulate(Fleet(1, 1, constant, max_batch=1), poisson(7.0, MANY, seed=5))
    assert statistics.fmean(outcome.latencies) - 1 / RATE == pytest.approx(0.7 / (2 * RATE * 0.3), rel=0.08)


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_an_answer_is_as_late_as_the_slowest_part(parts: int) -> None:
    """The greatest of n exponentials: its mean is the n-th harmonic number, its quantiles are known."""
    outcome = simulate(Fleet(parts, 1, exponential, hedge=False), poisson(0.02, 20_000 // parts, seed=6), seed=7)
    assert statistics.fmean(outcome.latencies) == pytest.approx(sum(1 / n for n in range(1, parts + 1)) / RATE, rel=0.05)
    assert share(outcome.latencies, 0.95) == pytest.approx(-math.log(1 - 0.95 ** (1 / parts)) / RATE, rel=0.08)


def test_what_waits_is_searched_together() -> None:
    """A second of arrivals at twenty times the rate of single searches, each joint search as long as one of one query."""
    together = simulate(Fleet(1, 1, constant), poisson(200.0, 20_000, seed=8))
    assert max(together.latencies) <= 2 / RATE + 1e-9, "the search under way and the next one"
    pairs = simulate(Fleet(1, 1, constant, max_batch=2), [0.0, 0.001, 0.002, 0.003, 0.004])
    assert [round(seconds * RATE, 2) for seconds in pairs.latencies] == [1.0, 1.99, 1.98, 2.97, 2.96]


def test_a_second_request_cuts_the_tail_within_its_budget() -> None:
    """One search in fifty takes forty times as long."""

    def slow(batch: int, draw: random.Random) -> float:
        return 4.0 if draw.random() < 0.02 else 0.1

    arrivals = poisson(0.5, 10_000, seed=9)
    without, with_ = (simulate(Fleet(1, 2, slow, hedge=hedge), arrivals, seed=10) for hedge in (False, True))
    assert without.hedges == 0 and share(without.latencies, 0.99) == pytest.approx(4.0, rel=0.05)
    assert share(with_.latencies, 0.99) < 0.5
    assert 100 < with_.hedges <= 10 + 0.1 * len(arrivals)
    assert share(with_.latencies, 0.5) == share(without.latencies, 0.5) == pytest.approx(0.1)


def test_without_its_other_replica_a_part_is_a_single_one_and_no_query_is_lost() -> None:
    arrivals = poisson(6.0, MANY, seed=11)
    outcome = simulate(Fleet(1, 2, exponential, max_batch=1, hedge=False, lost=0.0), arrivals, seed=12)
    assert len(outcome.latencies) == MANY and min(outcome.latencies) > 0
    assert share(outcome.latencies, 0.95) == pytest.approx(-math.log(0.05) / (RATE - 6.0), rel=0.1)
    both = simulate(Fleet(1, 2, exponential, max_batch=1, hedge=False), arrivals, seed=12)
    half = simulate(Fleet(1, 2, exponential, max_batch=1, hedge=False, lost=0.5), arrivals, seed=12)
    assert both.latencies[: MANY // 2 - 50] == half.latencies[: MANY // 2 - 50]
    assert statistics.fmean(both.latencies) < statistics.fmean(half.latencies) < statistics.fmean(outcome.latencies)


def test_equal_seeds_give_equal_outcomes_and_a_request_costs_what_it_costs() -> None:
    arrivals = poisson(5.0, 500)
    one, again = (simulate(Fleet(3, 2, exponential), arrivals, seed=13) for _ in range(2))
    assert one == again != simulate(Fleet(3, 2, exponential), arrivals, seed=14)
    plain, dearer = (simulate(Fleet(2, 1, constant, hedge=False, request_s=extra), arrivals) for extra in (0.0, 0.02))
    assert [b - a for a, b in zip(plain.latencies, dearer.latencies, strict=True)] == pytest.approx([0.02] * 500)
