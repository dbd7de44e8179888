"""A benchmark: what it plays, and what its tables say of differences, repeated samples and marked questions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import beta, binomtest

from research_rl.config import BenchConfig, BenchModel, Config, load_profile
from research_rl.errors import ConfigError
from research_rl.evaluation import bench, cells, judging
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.evidence import Evidence
from research_rl.evaluation.judge_metrics import measure
from research_rl.evaluation.judge_presets import PRESETS
from research_rl.evaluation.judging import Judged, Judgement, Protocol
from research_rl.evaluation.matrix import CellOutcome
from research_rl.evaluation.methods import METHODS
from research_rl.evaluation.published import against, publication, values
from research_rl.evaluation.results import Result, read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.report.compare import compare
from research_rl.report.matrix import describe, describe_against
from tests.results import played, standing

MODEL = Model("before", Path("/models/before"), "a" * 64)
AFTER = Model("after", Path("/models/after"), "b" * 64)


def answers(right: int, total: int, source: str = "made") -> list[Result]:
    """Return the results of `total` questions, the first `right` of them answered."""
    return [played(row, "Ada" if row < right else "Bob", source=source) for row in range(total)]


def line(table: str, start: str) -> list[str]:
    """Return the cells of the row that begins so."""
    (found,) = [row for row in table.splitlines() if row.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_published_model_with_its_prompt_is_one_line_of_configuration() -> None:
    section = Config.model_validate({"bench": {"models": ["before", {"model": "hub:a/b", "prompt": {"template": "instruct"}}]}}).bench
    assert section.models[0] == BenchModel(model="before")
    assert section.models[1].prompt and section.models[1].prompt.template == "instruct"


@pytest.mark.parametrize("profile", ["laptop", "paper-7b", "paper-7b-base-node", "paper-32b", "paper-32b-base"])
def test_the_profiles_name_methods_that_exist(profile: str) -> None:
    section = load_profile(profile).bench
    assert {*section.methods, *(name for each in section.models for name in each.methods)} <= set(METHODS)


def test_what_a_command_names_takes_the_place_of_the_section() -> None:
    own = BenchModel.model_validate({"model": "hub:a/b", "prompt": {"template": "instruct"}, "methods": ["naive"]})
    section = BenchConfig(models=(BenchModel(model="hub:a/b"), BenchModel(model="before"), own), samples=3)
    assert bench.chosen(section, None, None, None, None) == section
    named = bench.chosen(section, ["hub:a/b", "after"], "research,oracle", "odd", 2)
    assert [each.model for each in named.models] == ["hub:a/b", "after"] and named.models[0].prompt == own.prompt
    assert (named.methods, named.models[0].methods, named.sets, named.samples) == (("research", "oracle"), (), ("odd",), 2)
    with pytest.raises(ConfigError, match="--samples 0 plays nothing"):
        bench.chosen(section, None, None, None, 0)


def test_a_model_is_played_by_its_own_methods_and_prompt(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for stage in ("policy", "export"):
        with manifest.publish(workspace.folder(stage), stage, stage, {}):
            pass
    after = {"model": "after", "prompt": {"template": "instruct"}, "methods": ["naive"]}
    config = Config.model_validate({"bench": {"models": ["before", after]}})
    matrix = bench.matrix(config.bench, config, workspace)
    assert [matrix.methods_of(each) for each in matrix.models] == [config.bench.methods, ("naive",)]

    def hashes(model: Model) -> str:
        return cells.cells(config, workspace, {}, [model], ["naive"], ["odd"], 1)[0].hash

    plain = Model(matrix.models[1].name, matrix.models[1].folder, matrix.models[1].sha256)
    assert hashes(plain) != hashes(matrix.models[1]), "the same model with another prompt is another cell"
    assert matrix.models[1].shown == "after (prompt instruct)" and plain.shown == "after"


def test_differences_carry_mcnemar_and_holm_over_the_sets(tmp_path: Path) -> None:
    outcomes = [
        standing(tmp_path, MODEL, method, answers(right, 20, source))
        for method, numbers in (("research", {"even": 12, "odd": 9}), ("closed-book", {"even": 4, "odd": 4}))
        for source, right in numbers.items()
    ]
    table = describe(outcomes)
    # 8 of 8 that changed: 2 / 2^8; 5 of 5: 2 / 2^5. Holm doubles the smaller one alone.
    even, odd = line(table, "what search adds, before | even"), line(table, "what search adds, before | odd")
    assert even[4:] == ["+0.400", "8", "0", "0.008", "0.016", "20"]
    assert odd[4:] == ["+0.250", "5", "0", "0.062", "0.062", "20"]


def test_models_and_the_oracle_are_compared_with_the_first_model_and_our_protocol(tmp_path: Path) -> None:
    sides = [(MODEL, "research", 8), (AFTER, "research", 12), (AFTER, "single-search", 10), (AFTER, "oracle", 15)]
    table = describe([standing(tmp_path, model, method, answers(right, 20)) for model, method, right in sides])
    assert line(table, "after against before, research | made")[4] == "+0.200"
    assert line(table, "what further searches add, after | made")[4] == "+0.100"
    assert line(table, "what the right passages would add, after | made")[4] == "+0.150"
    assert "what search adds" not in table, "no closed-book cell was played"


def test_repeated_samples_give_averages_and_passes(tmp_path: Path) -> None:
    # Four questions; right in 2, 1, 1 and 0 of two samples.
    samples = [answers(3, 4), answers(1, 4)]
    table = describe([standing(tmp_path, MODEL, "research", found, sample=n) for n, found in enumerate(samples)])
    row = next(row for row in table.splitlines() if "avg@2" in row)
    assert "pass@2" in row and "pass^2" in row
    values = table.splitlines()[table.splitlines().index(row) + 2].split("|")
    assert [value.strip()[:5] for value in values[4:8]] == ["0.500", "0.500", "0.750", "0.250"]


def test_models_that_share_a_name_are_told_apart_and_are_no_samples_of_one(tmp_path: Path) -> None:
    sides = [(Model("policy", Path(f"/models/{letter}/policy"), letter * 64), right) for letter, right in (("a", 8), ("b", 12))]
    table = describe([standing(tmp_path, model, "research", answers(right, 20)) for model, right in sides])
    assert "avg@" not in table and "pass@" not in table
    for letter, mean in (("a", "0.400"), ("b", "0.600")):
        assert line(table.split("\n\n")[0], f"policy [{letter * 8}] | research | made")[5].startswith(mean)
    assert line(table, f"policy [{'b' * 8}] against policy [{'a' * 8}], research | made")[4] == "+0.200"


def test_marked_questions_are_shown_with_and_without(tmp_path: Path) -> None:
    known, question = answers(2, 4), "who wrote the first program"
    shown = played(3, "Ada", [("program", f"Forum: {question}? Ada.")], question=question)
    ours = [*answers(3, 3), shown]
    closed = [*known[:3], played(3, "Bob", question=question)]
    outcomes = [standing(tmp_path, MODEL, "research", ours), standing(tmp_path, MODEL, "closed-book", closed)]
    table = describe(outcomes)
    marks = table[table.index("in passages") :]
    # Two are right in closed book, one stands in a passage: one of four is left, and it is right.
    row = line(marks, "before | research | made")
    assert (row[3:6], row[7][:5], row[8]) == (["4", "1", "2"], "1.000", "1")
    alone = describe(outcomes[:1])
    assert line(alone[alone.index("in passages") :], "before | research | made")[5] == "not played"


@pytest.mark.parametrize(
    ("name", "policy", "method", "right", "said"),
    [
        # 43.52 % of 7,405, asked 40 questions: 0.280 to 0.602.
        ("agentrl/ReSearch-Qwen-7B-Instruct", "x", "research", 17, ["0.425", "0.4352 (ReSearch-Qwen-7B-Instruct)", "inside"]),
        ("ReSearch-Qwen-7B-Instruct", "x", "research", 8, ["0.200", "0.4352 (ReSearch-Qwen-7B-Instruct)", "below"]),
        ("after", "Qwen/Qwen2.5-32B", "research", 40, ["1.000", "0.4277 (ReSearch-Qwen-32B)", "above"]),
        ("before", "Qwen/Qwen2.5-7B-Instruct", "naive", 13, ["0.325", "0.3190 (Qwen2.5-7B-Instruct)", "inside"]),
    ],
)
def test_results_are_placed_in_the_published_band(tmp_path: Path, name: str, policy: str, method: str, right: int, said: list[str]) -> None:
    config = Config.model_validate({"policy": {"source": "hub", "path": policy}})
    outcome = standing(tmp_path, Model(name, tmp_path, "c" * 64), method, answers(right, 40, "hotpotqa"))
    exact = describe_against([outcome], "paper", config).split("Called right by a judge")[0]
    row = line(exact, f"{name} | {method} | hotpotqa")
    assert [row[3], row[4], row[6]] == said and row[7] == "40"


def test_the_table_of_cells_has_seconds(tmp_path: Path) -> None:
    outcome = standing(tmp_path, MODEL, "research", [replace(found, seconds=2.5) for found in answers(3, 4)])
    table = describe([outcome]).split("\n\n")[0]
    assert line(table, "model | method | set")[-1] == "seconds" and line(table, "before | research | made")[-1].startswith("2.50 (")


def judge(outcome: CellOutcome, verdicts: Sequence[bool | None], model: str, preset: str = "research", *, swapped: bool = False) -> None:
    """Publish a judgement of a cell, with a verdict a question, None where the judge failed."""
    cell, found = outcome.cell, outcome.manifest
    assert found
    protocol = Protocol(PRESETS[preset], model, swapped)
    judged = [Judged.of(result, correct=right) for result, right in zip(read_results(cell.folder), verdicts, strict=True)]
    judgement = Judgement(cell.folder, protocol, judging._hash(protocol, found), cell.root)
    with manifest.publish(judgement.folder, judging.STAGE, judgement.hash, {found.stage: found}, protocol.parameters) as staging:
        (staging.path / judging.METRICS).write_text(json.dumps(measure(judged, 100, 1)))


def judged_rows(outcome: CellOutcome) -> list[list[str]]:
    table = describe_against([outcome], "paper", Config())
    rows = table[table.index("Called right by a judge") :].splitlines()
    return [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows if "hotpotqa" in row]


def test_verdicts_are_placed_beside_those_of_the_papers_judge_with_our_judges_name(tmp_path: Path) -> None:
    model = Model("agentrl/ReSearch-Qwen-7B-Instruct", tmp_path, "c" * 64)
    outcome = standing(tmp_path, model, "research", answers(17, 44, "hotpotqa"))
    # 63.62 % of 40 questions with a verdict: 0.470 to 0.783 by Clopper and Pearson.
    judge(outcome, [*[True] * 26, *[False] * 14, *[None] * 4], "our/judge")
    judge(outcome, [*[True] * 10, *[False] * 34], "harsh/judge")
    judge(outcome, [True] * 44, "our/judge", "strict")
    judge(outcome, [True] * 44, "our/judge", swapped=True)
    low, high = beta.ppf(0.025, 0.6362 * 40, 40 * 0.3638 + 1), beta.ppf(0.975, 0.6362 * 40 + 1, 40 * 0.3638)
    rows = {row[8]: row[3:8] for row in judged_rows(outcome)}
    assert rows["our/judge"] == ["0.650", "0.6362 (ReSearch-Qwen-7B-Instruct)", f"{low:.3f} to {high:.3f}", "inside", "40"]
    assert rows["harsh/judge"][0] == "0.227" and rows["harsh/judge"][3:] == ["below", "44"]
    assert len(rows) == 2, "verdicts of another preset, and swapped ones, are not the published protocol's"


def test_a_cell_without_verdicts_says_how_to_get_them(tmp_path: Path) -> None:
    model = Model("agentrl/ReSearch-Qwen-7B-Instruct", tmp_path, "c" * 64)
    outcome = standing(tmp_path, model, "research", answers(17, 40, "hotpotqa"))
    judge(outcome, [None] * 40, "dead/judge")
    (row,) = judged_rows(outcome)
    folder = outcome.cell.folder.relative_to(tmp_path)
    assert row[3:] == ["", "0.6362 (ReSearch-Qwen-7B-Instruct)", "", "", "", f"not judged: `research judge {folder} --preset research`"]


def test_every_published_value_of_the_judge_is_used() -> None:
    found = publication("paper")
    cells = [
        Cell(Model(family.models[0], Path(), "c"), method, name, 0, "h", Path())
        for family in found.families
        for method in family.methods
        for name in found.sets
    ]
    assert len(list(values(found, cells, Config(), "judge"))) == len(list(values(found, cells, Config(), "em"))) == len(cells)
    assert not list(values(found, [replace(cell, evidence=Evidence("noise", "0.5")) for cell in cells], Config(), "em"))


def test_the_band_is_that_of_the_fewer_questions(tmp_path: Path) -> None:
    model = Model("agentrl/ReSearch-Qwen-7B", tmp_path, "c" * 64)
    outcome = standing(tmp_path, model, "research", answers(60, 200, "bamboogle"))
    (placed,) = against(publication("paper"), {outcome.cell: answers(60, 200, "bamboogle")}, Config())
    # 54 of 125 by Clopper and Pearson.
    interval = binomtest(54, 125).proportion_ci()
    assert (placed.n, placed.low, placed.high) == (125, pytest.approx(interval.low), pytest.approx(interval.high))
    assert placed.place == "below"


def test_what_has_no_published_value_is_said_and_an_unknown_publication_refused(tmp_path: Path) -> None:
    outcome = standing(tmp_path, MODEL, "research", answers(1, 2))
    assert "No cell has a value in arXiv 2503.19470" in describe_against([outcome], "paper", Config())
    with pytest.raises(ConfigError, match="--against rumour is not known; name one of paper"):
        publication("rumour")


def test_the_published_averages_are_the_papers() -> None:
    """The paper claims 15.81 points of exact match over Iter-RetGen for 7B and 14.82 for 32B, and 17.56 and 15.46 of the judge."""
    families = {family.name: family.methods for family in publication("paper").families}

    def mean(family: str, method: str, metric: str) -> float:
        (values,) = [found for name, found in families[family][method].items() if name == metric]
        return statistics.mean(values.values())

    for size, claims in {"7B": {"em": 15.81, "judge": 17.56}, "32B": {"em": 14.82, "judge": 15.46}}.items():
        for metric, gain in claims.items():
            ours = mean(f"ReSearch-Qwen-{size}-Instruct", "research", metric)
            assert ours - mean(f"Qwen2.5-{size}-Instruct", "iter-retgen", metric) == pytest.approx(gain, abs=0.006)


def test_compare_tests_exact_match_on_each_set(tmp_path: Path) -> None:
    before = [*answers(4, 20, "even"), *answers(4, 20, "odd")]
    after = [*answers(12, 20, "even"), *answers(9, 20, "odd")]
    folders = [standing(tmp_path, model, "research", found).cell.folder for model, found in ((MODEL, before), (AFTER, after))]
    text = compare(folders[0], folders[1], tmp_path / "page.html")
    assert "| even | 8 | 0 | 0.008 | 0.016 |" in text and "| odd | 5 | 0 | 0.062 | 0.062 |" in text
    assert "McNemar" in (tmp_path / "page.html").read_text()
