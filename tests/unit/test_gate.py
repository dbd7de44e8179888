"""The gate errs as seldom as it promises although it looks after every question, and its outcome does not depend on the looks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from research_rl import config
from research_rl.config import GateConfig
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation.gate import Outcome, PairedQuestion, asked, decide, looks
from research_rl.evaluation.results import Result
from research_rl.evaluation.sequential import NEVER, first_shown, largest_capital, limits, log_capital
from research_rl.pipeline.stages import STAGES

Values = NDArray[np.float64]
RULES = GateConfig()
PLAIN = GateConfig(min_questions=1)


def rules_with(**changes: object) -> GateConfig:
    return GateConfig.model_validate({**PLAIN.model_dump(), **changes})


def binary(runs: int, questions: int, wins: float, losses: float, seed: int) -> Iterator[Values]:
    """Yield runs of differences of exact match, a thousand at a time: 1 with probability `wins`, -1 with `losses`, else 0."""
    rng = np.random.default_rng(seed)
    for _ in range(0, runs, 1000):
        drawn = rng.random((min(runs, 1000), questions))
        yield np.where(drawn < wins, 1.0, np.where(drawn < wins + losses, -1.0, 0.0))


def continuous(runs: int, questions: int, seed: int) -> Iterator[Values]:
    """Yield runs of differences of F1 between two samples of one policy, most of whose scores are 0, 1 or in between."""
    rng = np.random.default_rng(seed)
    for _ in range(0, runs, 1000):
        ability = rng.random((1000, questions))
        yield rng.beta(4 * ability + 0.1, 4.1 - 4 * ability) - rng.beta(4 * ability + 0.1, 4.1 - 4 * ability)


def pairs_of(differences: Values, data_source: str = "nq", **costs: float) -> list[PairedQuestion]:
    return [PairedQuestion(data_source, max(0.0, -d), max(0.0, d), **costs) for d in differences.tolist()]


def run_of(questions: int, wins: float, losses: float, seed: int = 1) -> Values:
    return next(binary(1, questions, wins, losses, seed))[0]


@pytest.mark.parametrize("kind", ["exact match", "f1"])
def test_equal_policies_are_promoted_in_fewer_than_alpha_of_10000_runs(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`first_shown` is what `decide` promotes by (see below); a look after every question is more often than after every batch."""
    runs = binary(10_000, 500, 0.2, 0.2, seed=11) if kind == "exact match" else continuous(10_000, 500, seed=12)
    promoted = sum(int((first_shown(block, RULES.min_gain, RULES.alpha) < NEVER).sum()) for block in runs)
    with capsys.disabled():
        print(f"\nfalse promotions, {kind}: {promoted / 10_000:.2%}")
    assert 0 < promoted / 10_000 <= RULES.alpha


def test_the_simulated_statistic_is_the_one_that_decides() -> None:
    for differences in next(binary(1000, 300, 0.25, 0.15, seed=3))[:40]:
        shown = float(first_shown(differences, 0.0, 0.05))
        decision = decide(pairs_of(differences), rules_with(margin=0.001))
        assert (decision.outcome is Outcome.PROMOTE) == (shown < NEVER)
        assert decision.evidence["decided_after"] == (None if shown == NEVER else shown)


@pytest.mark.parametrize("kind", ["gain", "rare", "continuous"])
def test_each_limit_holds_the_mean_at_every_look(kind: str) -> None:
    runs, mean = {
        "gain": (binary(2000, 500, 0.25, 0.15, 5), 0.1),
        "rare": (binary(2000, 500, 0.02, 0.01, 6), 0.01),
        "continuous": (continuous(2000, 500, 7), 0.0),
    }[kind]
    missed = np.array([[(first_shown(b, mean, 0.05) < NEVER).sum(), (first_shown(-b, -mean, 0.05) < NEVER).sum()] for b in runs]).sum(
        axis=0
    )
    assert (missed / 2000 <= 0.05).all()


def test_a_true_gain_is_promoted_in_most_runs_with_a_fraction_of_the_questions(capsys: pytest.CaptureFixture[str]) -> None:
    after = np.concatenate([first_shown(block, 0.0, 0.05) for block in binary(2000, 1000, 0.25, 0.15, seed=8)])
    used = np.minimum(np.maximum(np.ceil(after / RULES.batch) * RULES.batch, RULES.min_questions), 1000)
    with capsys.disabled():
        print(f"\ngain of 0.1, 1,000 questions: {(after < NEVER).mean():.1%} promoted, median saved {1000 - np.median(used):.0f}")
    assert (after < NEVER).mean() > 0.95
    assert np.median(used) < 500


def test_limits_are_those_that_are_shown_and_close_on_the_mean() -> None:
    differences = run_of(1000, 0.25, 0.15)
    low, high = limits(differences, 0.05)
    assert low < differences.mean() < high
    assert first_shown(differences, low - 1e-6, 0.05) < NEVER and first_shown(differences, low + 1e-6, 0.05) == NEVER
    assert first_shown(-differences, -high - 1e-6, 0.05) < NEVER and first_shown(-differences, -high + 1e-6, 0.05) == NEVER
    assert limits(np.array([]), 0.05) == (-1.0, 1.0)


def test_the_capital_does_not_depend_on_the_order_and_falls_as_the_bound_rises() -> None:
    differences = run_of(200, 0.3, 0.1)
    assert log_capital(differences, 0.1)[-1] == pytest.approx(log_capital(differences[::-1], 0.1)[-1])
    capitals = [log_capital(differences, bound)[-1] for bound in (-0.5, 0.0, 0.2, 1.0)]
    assert capitals == sorted(capitals, reverse=True)
    assert log_capital(np.array([1.0]), 0.0)[0] == pytest.approx(math.log1p((0.03 + 0.07 + 0.16 + 0.36 + 0.8) / 5))


@pytest.mark.parametrize(("value", "bound"), [(1.5, 0.0), (math.nan, 0.0), (0.0, -1.0), (0.0, 1.1)])
def test_what_lies_outside_the_range_is_refused(value: float, bound: float) -> None:
    with pytest.raises(ValueError, match=r"bound=|not all between -1 and 1"):
        log_capital(np.array([value]), bound)


def test_overwhelming_evidence_is_a_finite_number() -> None:
    assert json.loads(json.dumps(largest_capital(np.ones(5000), 0.0))) > 1e200


def test_better_is_promoted_and_worse_is_refused() -> None:
    better, worse = (decide(pairs_of(sign * run_of(1000, 0.25, 0.15)), RULES) for sign in (1, -1))
    assert (better.outcome, worse.outcome) == (Outcome.PROMOTE, Outcome.REFUSE)
    assert "a gain above 0 was shown after" in better.reason and better.evidence["low"] >= 0
    assert "a fall was shown after" in worse.reason and worse.evidence["high"] <= 0
    assert better.evidence["e_gain"] >= 20 and worse.evidence["e_fall"] >= 20
    assert better.evidence["mean"] == -worse.evidence["mean"]


def test_a_gain_below_the_smallest_one_is_not_promoted() -> None:
    decision = decide(pairs_of(run_of(1000, 0.25, 0.15)), rules_with(min_gain=0.2))
    assert decision.outcome is Outcome.UNDECIDED and "neither a gain above 0.2" in decision.reason


def test_little_difference_in_many_questions_is_equivalence_and_in_few_is_undecided() -> None:
    differences = run_of(2000, 0.01, 0.01)
    assert decide(pairs_of(differences[:100]), RULES).outcome is Outcome.UNDECIDED
    decision = decide(pairs_of(differences), RULES)
    assert decision.outcome is Outcome.EQUIVALENT
    assert -RULES.margin <= decision.evidence["low"] and decision.evidence["high"] <= RULES.margin


def test_no_promotion_before_the_fewest_questions() -> None:
    few, enough = decide(pairs_of(np.ones(99)), RULES), decide(pairs_of(np.ones(100)), RULES)
    assert few.outcome is Outcome.UNDECIDED and "gate.min_questions=100 is not reached" in few.reason
    assert enough.outcome is Outcome.PROMOTE and enough.evidence["decided_after"] == 100


def mixed(of_hotpotqa: float) -> list[PairedQuestion]:
    """1,000 questions in turn of nq, all won, and of hotpotqa, all with the difference given."""
    return [pair for _ in range(500) for pair in (PairedQuestion("nq", 0, 1), PairedQuestion("hotpotqa", 0.5, 0.5 + of_hotpotqa))]


def test_a_set_that_must_hold_and_falls_refuses_what_is_better_overall() -> None:
    rules = rules_with(must_hold={"hotpotqa": 0.05}, min_questions=400)
    fallen, held = decide(mixed(-0.2), rules), decide(mixed(0.0), rules)
    assert fallen.outcome is Outcome.REFUSE and "f1 of hotpotqa moved by -0.2" in fallen.reason and "tolerated 0.05" in fallen.reason
    assert held.outcome is Outcome.PROMOTE and held.reason.endswith("hotpotqa held.")
    assert fallen.evidence["sets"]["hotpotqa"]["e_falls"] >= 20 and held.evidence["sets"]["hotpotqa"]["e_holds"] >= 20
    assert decide(mixed(-0.2), PLAIN).outcome is Outcome.PROMOTE


def test_a_promotion_waits_for_the_proof_that_each_set_holds() -> None:
    decision = decide(pairs_of(np.ones(200)), rules_with(must_hold={"musique": 0.05}))
    assert decision.outcome is Outcome.UNDECIDED and "musique is not yet shown to fall by less than 0.05" in decision.reason
    assert decision.evidence["sets"]["musique"]["n"] == 0


@pytest.mark.parametrize(("ceiling", "costs"), [("max_mean_tokens", {"tokens": 500.0}), ("max_mean_searches", {"searches": 3.5})])
def test_a_gain_that_costs_more_than_its_ceiling_is_refused(ceiling: str, costs: dict[str, float]) -> None:
    ((name, cost),) = costs.items()
    pairs = pairs_of(np.ones(200), **costs)
    refused, kept = decide(pairs, rules_with(**{ceiling: cost - 0.5})), decide(pairs, rules_with(**{ceiling: cost}))
    assert refused.outcome is Outcome.REFUSE and f"{cost:g} {name} a question exceed gate.{ceiling}={cost - 0.5:g}" in refused.reason
    assert kept.outcome is Outcome.PROMOTE and kept.evidence["ceilings"][name] == {"mean": cost, "ceiling": cost}


@pytest.mark.parametrize(("wins", "losses", "questions"), [(0.25, 0.15, 600), (0.15, 0.25, 600), (0.0, 0.0, 600), (0.2, 0.2, 200)])
def test_the_outcome_does_not_depend_on_when_looks_were_taken(wins: float, losses: float, questions: int) -> None:
    pairs = pairs_of(run_of(questions, wins, losses), tokens=10.0)
    rules = rules_with(max_mean_tokens=20.0, min_questions=50, margin=0.05)
    final = decide(pairs, rules)
    for batch in (9, 32, 100, questions):
        taken = (decide(pairs[:n], rules) for n in range(batch, questions + batch, batch))
        stopped = next((d for d in taken if d.outcome is not Outcome.UNDECIDED), final)
        assert (stopped.outcome, stopped.evidence["decided_after"]) == (final.outcome, final.evidence["decided_after"])


def test_questions_lost_on_either_side_are_counted_and_in_no_other_number() -> None:
    pairs = pairs_of(run_of(300, 0.25, 0.15))
    lost = [PairedQuestion("nq", None, 1.0, tokens=9e9), PairedQuestion("nq", 0.0, None, tokens=9e9)]
    with_lost, without = decide([*lost, *pairs], RULES), decide(pairs, RULES)
    assert with_lost.evidence == {**without.evidence, "lost": 2} and with_lost.reason == without.reason
    assert decide(lost, RULES).reason == "No question has a score on both sides (2 lost), so nothing is shown."


def test_equal_arguments_give_equal_decisions_ready_for_json() -> None:
    pairs = mixed(0.1)
    assert decide(pairs, RULES) == decide(list(pairs), RULES)
    assert json.loads(json.dumps(decide(pairs, RULES).evidence, allow_nan=False)) == decide(pairs, RULES).evidence
    assert json.loads(json.dumps(decide([], RULES).evidence, allow_nan=False))["n"] == 0


def test_every_question_is_asked_once_in_a_random_order_that_the_seed_fixes() -> None:
    batches = looks(100, RULES)
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]
    assert sorted(place for batch in batches for place in batch) == list(range(100))
    assert batches == looks(100, RULES) != looks(100, rules_with(order_seed=18))
    assert np.mean(batches[0]) > 30  # not the first 32 of the file
    assert looks(0, RULES) == []


def result(f1: float, stop: str = "answered", recall: float | None = None) -> Result:
    empty = {field.name: 0.0 for field in fields(Result)}
    return Result(
        **{**empty, "data_source": "nq", "f1": f1, "stop": stop, "recall": recall, "searches": 2, "tokens": 80, "failed_searches": 0}
    )


def test_a_pair_of_results_is_read_with_the_costs_of_the_challenger() -> None:
    assert asked(result(0.25), result(0.75), "f1") == PairedQuestion("nq", 0.25, 0.75, 2.0, 80.0)
    assert asked(result(0.25), result(0.0, "engine_failure"), "f1").difference is None
    assert asked(result(0.25, recall=0.5), result(0.75), "recall").difference is None
    with pytest.raises(ConfigError, match=r"gate\.metric='reward' is no score between 0 and 1; choose one of \['acc', .*'em', 'f1'"):
        asked(result(0.25), result(0.75), "reward")


def test_a_score_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match=r"a question of nq has the score 1\.5, the limits are 0 and 1; choose another gate\.metric"):
        decide([PairedQuestion("nq", 0.0, 1.5)], RULES)


def test_a_fall_that_no_score_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nq=2 is no fall of a score between 0 and 1"):
        config.load_profile("laptop", ["gate.must_hold={nq: 2}"])


def test_the_gate_makes_no_stage_stale() -> None:
    one, other = config.load_profile("laptop"), config.load_profile("laptop", ["gate.alpha=0.01", "gate.must_hold={nq: 0.05}"])
    assert one.gate != other.gate
    assert not [name for name, s in STAGES.items() if config.config_hash(one, s.sections) != config.config_hash(other, s.sections)]
