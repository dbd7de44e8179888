"""Two evaluations differ: each component gets a share, the shares sum up to the difference, and only what is still there is played."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from research_rl.config import Config
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation import blame, cells, crossings
from research_rl.evaluation.blame import Crossing, Evaluated, ExchangePlan, Joint, attribute, differing, steps
from research_rl.evaluation.cells import Model
from research_rl.evaluation.results import Result
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from research_rl.report import blame as report
from tests.results import CONFIG, lost, played, standing
from tests.unit.test_cells import Bench, bench, tokenizer

__all__ = ["bench", "tokenizer"]

RESAMPLES, SEED = 200, 1
NOTHING: Crossing = frozenset()


def right(*rows: int, of: int = 10) -> list[Result]:
    """Return the results of `of` questions of which these rows are answered."""
    return [played(row, "Ada" if row in rows else "Bob") for row in range(of)]


def shares(points: dict[Crossing, list[Result]], plan: ExchangePlan, metric: str = "em") -> dict[Joint, float]:
    found, total = attribute(points, plan, metric, RESAMPLES, SEED)
    assert sum(share.difference.mean for share in found) == pytest.approx(total.mean, abs=1e-12)
    return {share.components: share.difference.mean for share in found}


def test_shares_worked_by_hand() -> None:
    plan = steps(["index", "prompt"])
    # Prompt alone wins 2 questions, index alone 1, both together 5: index (1 + 3) / 2, prompt (2 + 4) / 2.
    points = {NOTHING: right(), frozenset({"index"}): right(0), frozenset({"prompt"}): right(1, 2), plan.everything: right(0, 1, 2, 3, 4)}
    assert shares(points, plan) == pytest.approx({("index",): 0.2, ("prompt",): 0.3})
    ordered = steps(["index", "prompt"], order=["prompt", "index"])
    assert ordered.crossings == [frozenset({"prompt"})], "one order needs one evaluation in between"
    assert shares({point: points[point] for point in points if point != frozenset({"index"})}, ordered) == pytest.approx(
        {("prompt",): 0.2, ("index",): 0.3}
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("gone", [((), ()), (("data",), ()), ((), ("data",)), (("data",), ("index",))])
def test_the_shares_sum_up_to_the_difference(count: int, gone: tuple[Sequence[str], Sequence[str]]) -> None:
    draw, differ = random.Random(count), blame.COMPONENTS[:count]
    plan = steps(differ, gone)
    points = {
        point: [played(row, draw.choice(["Ada", "Bob", "Ada Bob"])) for row in range(30)]
        for point in [NOTHING, plan.everything, *plan.crossings]
    }
    for metric in ("f1", "em"):
        assert set(chain(*shares(points, plan, metric))) == set(differ)


def test_a_component_that_changes_nothing_has_no_share_and_equal_ones_have_equal_shares() -> None:
    plan = steps(["index", "prompt", "limits"])
    points = {point: right(*range(3 * len(point - {"limits"}))) for point in [NOTHING, plan.everything, *plan.crossings]}
    found, _ = attribute(points, plan, "em", RESAMPLES, SEED)
    means = [share.difference.mean for share in found]
    assert means == pytest.approx([0.3, 0.3, 0.0]) and not found[2].difference.significant


def test_a_question_that_any_evaluation_lost_is_in_no_share() -> None:
    plan = steps(["index", "prompt"])
    points = {NOTHING: right(), frozenset({"index"}): right(0), frozenset({"prompt"}): right(1), plan.everything: right(0, 1)}
    points[frozenset({"index"})][0] = lost(0)
    found, total = attribute(points, plan, "em", RESAMPLES, SEED)
    assert total.n == 9 and [share.difference.mean for share in found] == pytest.approx([0.0, 1 / 9])
    with pytest.raises(DataError, match="no question has em in all 4 evaluations"):
        attribute({point: [lost(0)] for point in points}, plan, "em", RESAMPLES, SEED)


def test_what_is_gone_from_a_is_exchanged_first_and_what_is_gone_from_b_last() -> None:
    plan = steps(["data", "index", "prompt", "policy"], (["data"], ["policy"]))
    assert (plan.first, plan.free, plan.last) == (("data",), (("index",), ("prompt",)), ("policy",))
    assert plan.crossings == [frozenset(found) for found in (["data"], ["data", "index"], ["data", "prompt"], ["data", "index", "prompt"])]
    both = steps(["data", "prompt"], (["data"], ["data"]))
    assert both.crossings == [] and both.players == [("data", "prompt")], "nothing can be played: one joint share"
    same = steps(["prompt", "limits"], (["index"], ["index"]))
    assert same.crossings == [], "the index of both is gone, though it does not differ"


def test_components_are_put_together_and_too_many_need_an_order() -> None:
    differ = ["data", "index", "prompt", "policy", "limits"]
    with pytest.raises(
        ConfigError, match=r"all crossings of 5 components are 32 evaluations, and 4 components are the limit; give --order data,"
    ):
        steps(differ)
    assert len(steps(differ, order=["policy"]).crossings) == 4
    together = steps(differ, together=[["data", "index"]])
    assert ("data", "index") in together.free and len(together.crossings) == 14
    with pytest.raises(ConfigError, match="engine is not among what differs between A and B: data, index"):
        steps(differ, order=["engine"])
    with pytest.raises(DataError, match="A and B differ in none of data, index"):
        steps([])


class Space:
    """A workspace with everything but servers; its evaluations are published, not played."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        for name in (*cells.PARENTS, "policy", "export"):
            self.build(name, name)
        prompt = root / "own.txt"
        prompt.write_text("Answer: {question}")
        self.config = Config.model_validate({"prompt": {"template": "file", "path": str(prompt)}})

    def build(self, name: str, content: str) -> None:
        with manifest.publish(self.workspace.folder(name), name, content, {}) as staging:
            if name == "prepare":
                write_questions(staging.path / "test.parquet", 10)

    def evaluated(
        self, results: list[Result], *, model: str = "before", method: str = "research", config: Config | None = None
    ) -> Evaluated:
        built = cells.parents(self.workspace, CONFIG)
        each = cells.model(model, CONFIG, self.workspace)
        outcome = standing(self.workspace.root, each, method, results, config=config or self.config, built=built)
        return crossings.evaluated(outcome.cell.folder)


def write_questions(path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    extra = [
        {"id": f"q{row}", "question": f"Question {row}?", "golden_answers": ["Ada"], "supporting_passage_ids": []} for row in range(rows)
    ]
    pq.write_table(pa.table({"data_source": ["made"] * rows, "extra_info": extra}), path)


def changed(config: Config, **sections: dict[str, object]) -> Config:
    tree = config.model_dump(mode="json")
    return Config.model_validate({**tree, **{name: {**tree[name], **values} for name, values in sections.items()}})


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space(tmp_path / "work")


def test_the_components_that_differ_are_those_that_decide(space: Space) -> None:
    a = space.evaluated(right())

    def against(**sections: dict[str, object]) -> list[str]:
        return differing(a, space.evaluated(right(), config=changed(space.config, **sections)))

    assert differing(a, a) == []
    assert differing(a, space.evaluated(right(), model="after", method="closed-book")) == ["policy", "method"]
    assert against(episode={"max_searches": 1}) == ["limits"] == against(evaluation={"published_limits": True})
    assert against(serving={"dtype": "bfloat16"}) == ["engine"]
    assert against(evaluation={"rows": 5}, prompt={"template": "base", "path": None}) == ["data", "prompt"]
    assert against(evaluation={"temperature": 1.0}) == ["sampling"]
    assert against(evaluation={"seed": 3, "bootstrap": 300}, reward={"rule": "paper"}) == [], "greedy text knows no seed, F1 no reward"
    space.build("index", "another")
    assert differing(a, space.evaluated(right())) == ["index"]


def test_what_can_no_longer_be_played_is_named(space: Space, tmp_path: Path) -> None:
    a = space.evaluated(right())
    where = crossings.places(Workspace(tmp_path / "elsewhere"), a, a)
    assert crossings.gone(a, where) == {}, "the workspace of the evaluation itself is looked through"
    (tmp_path / "work" / "own.txt").unlink()
    assert crossings.gone(a, where) == {}, "the template is kept beside the results"
    for stage in ("prepare", "embed", "policy"):
        space.build(stage, "another")
    (a.folder / "prompt.txt").unlink()
    assert set(crossings.gone(a, where)) == {"data", "index", "prompt", "policy"}
    assert "name its folder by --model" in crossings.gone(a, where)["policy"]
    own = Model("own", tmp_path, a.model_sha256)
    assert "policy" not in crossings.gone(a, crossings.places(space.workspace, a, a, [own]))


def test_a_plan_shows_each_cell_and_a_standing_one_is_not_played(space: Space) -> None:
    a = space.evaluated(right(0))
    b = space.evaluated(right(0, 1, 2, 3), model="after", config=changed(space.config, episode={"max_searches": 1}))
    where = crossings.places(space.workspace, a, b)
    plan = steps(differing(a, b))
    planned = crossings.planned(plan, a, b, where, space.config)
    assert [sorted(point) for point in planned] == [["policy"], ["limits"]] and not any(
        stands for found in planned.values() for _, stands in found
    )
    assert report.plan_text(plan, ({}, {}), planned).count("to be played") == 2
    for point, ((cell, _),) in planned.items():
        shutil.copytree((b if "policy" in point else a).folder, cell.folder)
    points = crossings.play(plan, a, b, where, space.config, silent)
    found = report.weigh(a, b, plan, ({}, {}), points)
    text = report.describe(found)
    assert "F1 differs by +0.300 on 10 questions; the largest share, +0.300, is that of policy" in text
    assert "| all together |" in text and "Shapley" in text
    page = report.page(found)
    assert "episode.max_searches" in page and "all together" in page and "<script" not in page


def test_a_crossing_is_played_with_the_prompt_and_data_of_its_sides(space: Space, tmp_path: Path) -> None:
    other = Space(tmp_path / "other")
    other.build("prepare", "more")
    prompt = tmp_path / "other" / "own.txt"
    prompt.write_text("Reply: {question}")
    a, b = (
        space.evaluated(right(0)),
        other.evaluated(right(1), config=changed(other.config, prompt={"path": str(prompt), "max_tokens": 99})),
    )
    prompt.unlink()
    assert differing(a, b) == ["data", "prompt"]
    where = crossings.places(space.workspace, a, b)
    assert crossings.gone(b, where) == {}
    planned = crossings.planned(steps(["data", "prompt"]), a, b, where, space.config)
    assert all(cell.root == space.workspace.root for ((cell, _),) in planned.values())
    crowded = crossings.planned(
        steps(["data", "prompt"]), a, b, where, changed(space.config, evaluation={"concurrency": 1, "max_failures": 0.5})
    )
    assert crowded == planned, "how many episodes run at once decides no cell"
    kept = next((space.workspace.root / "artifacts" / ".work" / "prompts").glob("*.txt"))
    texts = {path.read_text() for path in kept.parent.iterdir()}
    assert texts == {"Answer: {question}", "Reply: {question}"}


def test_the_crossings_of_two_played_cells_are_played_once(bench: Bench) -> None:
    (first,) = bench.play("research", sets=("odd",))
    tree = bench.config().model_dump(mode="json")
    tree["episode"] |= {"max_searches": 1}
    config = Config.model_validate(tree)
    from research_rl.evaluation.matrix import Matrix, play

    (second,) = play(config, bench.workspace, Matrix([bench.model()], ["closed-book"], ("odd",)), silent)
    a, b = (crossings.evaluated(item.cell.folder) for item in (first, second))
    plan = steps(differing(a, b))
    assert plan.players == [("method",), ("limits",)]
    where = crossings.places(bench.workspace, a, b)
    bench.services.asked.clear()
    points = crossings.play(plan, a, b, where, bench.config(), silent)
    assert len(bench.services.asked) == 10, "two crossings of five questions"
    found = report.weigh(a, b, plan, (crossings.gone(a, where), crossings.gone(b, where)), points)
    for metric in ("f1", "em"):
        each, total = found.shares[metric]
        assert sum(share.difference.mean for share in each) == pytest.approx(total.mean)
    bench.services.asked.clear()
    assert crossings.play(plan, a, b, where, bench.config(), silent).keys() == points.keys() and bench.services.asked == []
    recorded = [json.loads(path.read_text()) for path in (bench.workspace.root / "artifacts" / "cells").glob("*/parameters.json")]
    assert sorted((each["cell"]["method"], each["episode"]["max_searches"]) for each in recorded) == [
        ("closed-book", 1),
        ("closed-book", bench.config().episode.max_searches),
        ("research", 1),
        ("research", bench.config().episode.max_searches),
    ]
