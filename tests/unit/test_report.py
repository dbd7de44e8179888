"""The report counts right, its pages are safe and self-contained, and equal inputs give equal bytes."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from research_rl.config import Config, JudgeConfig, RewardConfig, load_profile, parameters
from research_rl.episode.trajectory import Author, SearchFault, SearchRecord, Segment, StopReason, Trajectory
from research_rl.errors import DataError
from research_rl.evaluation.comparison import compare_metrics, match, outcome
from research_rl.evaluation.results import HeldOutQuestion, Result, to_result, write_results
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, deciding
from research_rl.report import html, provenance
from research_rl.report.build import run
from research_rl.report.compare import compare, load
from research_rl.report.training import SERIES, read_curves
from research_rl.report.viewer import QUESTIONS, SEGMENT_CHARS, evaluated, rolled_out, spread, validated
from research_rl.reward.grader import Grader
from research_rl.reward.rules import grade
from research_rl.training.run.episodes import record, summarise
from research_rl.training.run.rollouts import read_rollouts, rollout_files

EMPTY_PAGE = {"html", "head", "meta", "title", "style", "body", "h1", "script"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028"


def segment(author: Author, text: str) -> Segment:
    ids = tuple(range(len(text.split())))
    return Segment(author, ids, (0.0,) * len(ids), text)


def result(row: int, answer: str, searches: int = 1) -> Result:
    trajectory = Trajectory((1, 2), stop=StopReason.ANSWERED, ended_by_eos=True)
    for number in range(searches):
        trajectory.segments.append(segment(Author.MODEL, f"<think>t</think><search>query {number}</search>"))
        trajectory.segments.append(segment(Author.SEARCH, f" <result>\n{EVIL}\n</result>"))
        trajectory.searches.append(SearchRecord(f"query {number}", (f"p{number}",), 0.01))
    trajectory.segments.append(segment(Author.MODEL, f"<think>so</think><answer>\\boxed{{{answer}}}</answer>"))
    return measured(row, trajectory)


def measured(row: int, trajectory: Trajectory) -> Result:
    question = HeldOutQuestion(row, f"q{row}", "made", f"Question {row}? {EVIL}", ("Ada",), ("p0", "p1")[: 1 + row % 2])
    trained = asyncio.run(Grader(RewardConfig(), JudgeConfig(), "<eos>").grade(trajectory, question.target))
    return to_result(question, trajectory, trained, "<eos>", 0.1)


def evaluation(folder: Path, results: list[Result], **parameters: object) -> Manifest:
    stage = "baseline" if folder.name == "baseline" else "evaluate"
    with manifest.publish(folder, stage, "hash", {}) as staging:
        write_results(staging.path, results)
        (staging.path / "parameters.json").write_text(json.dumps(parameters))
    return manifest.load(folder)


def training(folder: Path, steps: int = 20) -> Manifest:
    with manifest.publish(folder, "train", "hash", {}) as staging:
        rows = [
            {"step": n, "metrics": {"episode/reward": n / steps, "episode/format": 1.0, "episode/searches": 2.0}}
            for n in range(1, steps + 1)
        ]
        (staging.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (staging.path / "rollouts").mkdir()
        for n in range(1, steps + 1):
            row = {"question": f"train {n % 3} {EVIL}", "golds": ["Ada"], "rollout": 0, "score": 0.1, **result(n, "Ada").trajectory}
            (staging.path / "rollouts" / f"{n:06d}.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    return manifest.load(folder)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    workspace = Workspace(tmp_path)
    parents = {
        "train": training(workspace.folder("train")),
        "baseline": evaluation(workspace.folder("baseline"), [result(n, "Bob" if n < 8 else "Ada") for n in range(10)]),
        "evaluate": evaluation(workspace.folder("evaluate"), [result(n, "Ada" if n < 9 else "Bob", 2) for n in range(10)]),
    }
    return Context(STAGES["report"], Config(), workspace, parents, lambda text, share: None)


def test_a_report_names_what_was_set_differently_from_the_profile_and_nothing_else(context: Context) -> None:
    file = context.parent("evaluate") / "parameters.json"
    profile = load_profile("laptop")
    file.write_text(json.dumps(parameters(profile, deciding(["evaluate"]))))
    assert provenance.changed(context) == []
    fewer = profile.model_copy(update={"seed": 7, "episode": profile.episode.model_copy(update={"max_searches": 2})})
    file.write_text(json.dumps(parameters(fewer, deciding(["evaluate"]))))
    named = {name: (before, now) for name, before, now in provenance.changed(context) or []}
    assert named == {"episode.max_searches": ("4", "2"), **dict.fromkeys(("seed", "data.seed", "train.seed"), ("42", "7"))}


def test_the_numbers_of_a_report(context: Context) -> None:
    run(context)
    folder = context.workspace.folder("report")
    assert manifest.load(folder).counts == {"questions": 10, "steps": 20, "wins": 8, "losses": 1, "ties": 1, "lost": 0}
    numbers = json.loads((folder / "metrics.json").read_text())
    assert (numbers["before"]["f1"], numbers["after"]["f1"]) == (0.2, 0.9)
    assert numbers["difference"]["f1"]["mean"] == pytest.approx(0.7)
    assert numbers["difference"]["f1"]["low"] > 0
    assert numbers["difference"]["searches"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "wins": 10, "losses": 0, "ties": 0, "n": 10}
    assert numbers["train"] == {"steps": 20, "reward_first": 0.075, "reward_last": 0.975}
    headline = json.loads((folder / "headline.json").read_text())
    assert headline["steps"] == 20 and set(headline) == {"steps", "f1", "em"}
    assert headline["f1"] == {"before": 0.2, "after": 0.9, **{k: headline["f1"][k] for k in ("difference", "low", "high")}, "questions": 10}
    curves = (folder / "curves.csv").read_text().splitlines()
    assert curves[0] == "step,reward,format,searches" and curves[1] == "1,0.05,1,2" and len(curves) == 21
    page = (folder / "report.html").read_text()
    assert "F1 0.200 before, 0.900 after: +0.700" in page and "better, and the interval leaves out 0" in page
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("fault", list(SearchFault))
def test_a_query_that_the_service_refused_is_no_failed_search(fault: SearchFault) -> None:
    """It was counted as lost to the retriever, and above two in a hundred nothing was published, however often it was tried."""
    trajectory = Trajectory((1,), stop=StopReason.ANSWERED, ended_by_eos=True)
    trajectory.segments.append(segment(Author.MODEL, "<think>so</think><answer>\\boxed{Ada}</answer>"))
    trajectory.searches.append(SearchRecord("q", (), 0.01, fault=fault))
    of_the_model = (SearchFault.REFUSED, SearchFault.EMPTY_QUERY, SearchFault.NOTHING)
    assert measured(0, trajectory).failed_searches == (0 if fault in of_the_model else 1)


def test_a_report_says_how_it_came_about_and_fits_dark_pages_and_telephones(context: Context) -> None:
    run(context)
    page = (context.workspace.folder("report") / "report.html").read_text()
    assert (
        f"<span>seed {context.config.seed}</span>" in page and "research-rl" in page and "Parameters that differ from the profile" in page
    )
    assert re.search(r'<source media="\(prefers-color-scheme: dark\)" srcset="data:image/png;base64,\w', page)
    assert '<meta name="viewport" content="width=device-width' in page and re.search(r"overflow-x:\s*auto", page)


def test_equal_inputs_give_equal_bytes(context: Context) -> None:
    run(context)
    first = manifest.load(context.workspace.folder("report"))
    run(context)
    assert manifest.load(context.workspace.folder("report")) == first


class Page(HTMLParser):
    """Collects scripts and every address or handler a page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "action"} or name.startswith("on")]
        if tag == "script":
            self.scripts.append((attributes.get("type"), ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes.get("content") or ""

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts and not self.scripts[-1][1]:
            self.scripts[-1] = (self.scripts[-1][0], data)


@pytest.mark.parametrize("name", ["report.html", "trajectories.html", "compare.html"])
def test_no_text_of_a_passage_or_question_becomes_markup_and_nothing_is_loaded(context: Context, name: str) -> None:
    run(context)
    folder = context.workspace.folder("report")
    compare(context.parent("baseline"), context.parent("evaluate"), folder / "compare.html")
    page = Page((folder / name).read_text())
    assert all(address.startswith("data:image/png") or address == "trajectories.html" for address in page.addresses)
    programs = [text for kind, text in page.scripts if kind is None]
    assert len(programs) == (1 if name == "trajectories.html" else 0)
    assert "alert" not in "".join(programs) and page.tags.count("img") <= 1
    allowed = re.findall(r"'sha256-([^']+)'", page.policy)
    assert allowed == [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in programs]
    assert "default-src 'none'" in page.policy


def test_the_viewer_holds_both_sides_of_a_question_and_training_steps(context: Context) -> None:
    run(context)
    page = Page((context.workspace.folder("report") / "trajectories.html").read_text())
    groups = json.loads(next(text for kind, text in page.scripts if kind == "application/json"))
    assert [item["phase"] for item in groups[0]["items"]] == ["before training", "after training"]
    assert groups[0]["question"] == f"Question 0? {EVIL}"
    assert groups[0]["items"][0]["segments"][1] == ["search", f" <result>\n{EVIL}\n</result>"]
    steps = sorted({int(item["kind"].split()[1]) for group in groups for item in group["items"] if item["kind"].startswith("step")})
    assert (steps[0], steps[-1], len(steps)) == (1, 20, 12)
    assert len([group for group in groups if group["question"].startswith("train")]) == 3


def test_the_viewer_is_bounded() -> None:
    pairs = [(result(n, "Bob"), result(n, "Ada" if n % 3 else "Bob")) for n in range(600)]
    groups = evaluated(pairs)
    assert len(groups) == QUESTIONS
    assert sum(group["outcome"] == "win" for group in groups) == QUESTIONS / 2
    rows = [{"step": 1, "question": "q", "segments": [{"author": "model", "text": "x" * 9000}]} for _ in range(50)]
    (group,) = rolled_out(rows)
    assert len(group["items"]) == 4
    assert len(group["items"][0]["segments"][0][1]) < SEGMENT_CHARS + 40
    assert spread(range(1, 1001), 5) == [1, 251, 501, 750, 1000]


def test_every_curve_of_a_step_is_drawn_from_a_metric_that_training_writes() -> None:
    trajectory = Trajectory((1, 2), stop=StopReason.ANSWERED)
    row = {"uid": "u", "rollout": 0, **record(trajectory, grade(trajectory, ["Ada"], "repository", "<eos>"))}
    assert {name for name in SERIES.values() if name.startswith("episode/")} <= set(summarise([row]))


def test_a_curve_holds_the_steps_that_have_its_metric_in_order(tmp_path: Path) -> None:
    rows = [{"step": 2, "metrics": {"episode/reward": 0.5}}, {"step": 1, "metrics": {"episode/reward": 0.25, "episode/model_tokens": 7}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    curves = read_curves(tmp_path)
    assert curves.series == {"reward": ([1, 2], [0.25, 0.5]), "tokens": ([1], [7.0])}
    assert (curves.steps, curves.ends("f1")) == (2, (0.0, 0.0))


def test_what_was_played_on_dev_before_the_first_step_begins_its_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 8, "metrics": {"dev/f1": 0.75}}))
    assert read_curves(tmp_path).series == {"dev_f1": ([8], [0.75])}
    (tmp_path / "rollouts" / "dev").mkdir(parents=True)
    (tmp_path / "rollouts/dev/000000.jsonl").write_text("".join(json.dumps({"f1": f1}) + "\n" for f1 in (0.0, 0.5)))
    assert read_curves(tmp_path).series == {"dev_f1": ([0, 8], [0.25, 0.75])}


def test_rollouts_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (10, 9):
        (tmp_path / "rollouts" / f"{step}.jsonl").write_text(json.dumps({"score": step}) + "\n")
    assert [row["step"] for row in read_rollouts(rollout_files(tmp_path))] == [9, 10]


def test_pairs_are_matched_by_question_not_by_place() -> None:
    before, after = [result(n, "Bob") for n in range(4)], [result(n, "Ada") for n in (3, 1, 9)]
    pairs = match(before, after).pairs
    assert [(a.id, b.id) for a, b in pairs] == [("q1", "q1"), ("q3", "q3")]
    assert [outcome(pair) for pair in pairs] == ["win", "win"]
    assert {metric.name: metric.difference.n for metric in compare_metrics(pairs, 200, 1)}["f1"] == 2


def lost(row: int) -> Result:
    """A question whose episode the model server ended."""
    return measured(row, Trajectory((1, 2), stop=StopReason.ENGINE_FAILURE, error="gone"))


def test_an_outage_during_one_evaluation_is_neither_a_gain_nor_a_loss(tmp_path: Path) -> None:
    before = [lost(n) if n < 3 else result(n, "Ada") for n in range(40)]
    after = [lost(n) if n == 2 else result(n, "Ada") for n in range(40)]
    matched = match(before, after)
    f1 = next(metric for metric in compare_metrics(matched.pairs, 200, 1) if metric.name == "f1")
    assert (f1.before, f1.after, f1.difference.mean, f1.difference.n) == (1.0, 1.0, 0.0, 37)
    assert [outcome(pair) for pair in matched.lost] == ["lost"] * 3
    evaluation(tmp_path / "baseline", before)
    evaluation(tmp_path / "evaluate", after)
    text = compare(tmp_path / "baseline", tmp_path / "evaluate", tmp_path / "page.html")
    said = "3 of 40 questions are in no difference, because the model server or the retriever failed in their episodes: 3 in A, 1 in B."
    assert said in text and said in (tmp_path / "page.html").read_text()


def test_the_report_counts_the_questions_it_leaves_out(context: Context) -> None:
    parents = context.parents | {
        "baseline": evaluation(context.workspace.folder("baseline"), [lost(n) if n < 2 else result(n, "Bob") for n in range(20)]),
        "evaluate": evaluation(context.workspace.folder("evaluate"), [result(n, "Ada") for n in range(20)]),
    }
    run(replace(context, parents=parents))
    folder = context.workspace.folder("report")
    report = manifest.load(folder)
    assert report.counts == {"questions": 20, "steps": 20, "wins": 18, "losses": 0, "ties": 0, "lost": 2}
    assert (report.facts["difference"]["f1"]["n"], report.facts["before"]["f1"]) == (18, 0.0)
    page = (folder / "report.html").read_text()
    assert "2 of 20 questions are in no difference" in page and "engine failure" in page
    groups = json.loads(next(text for kind, text in Page((folder / "trajectories.html").read_text()).scripts if kind))
    assert [group["outcome"] for group in groups].count("lost") == 2


def test_compare_names_what_was_set_differently_and_what_came_of_it(tmp_path: Path) -> None:
    common = {"evaluation": {"rows": None}, "episode": {"top_k": 3, "wall_s": 1}}
    evaluation(tmp_path / "a", [result(n, "Bob") for n in range(6)], **common)
    evaluation(tmp_path / "b", [result(n, "Ada") for n in range(5)], **{**common, "episode": {"top_k": 5, "wall_s": 1}}, train={"lr": 1})
    text = compare(tmp_path / "a", tmp_path / "b", tmp_path / "page.html")
    assert "5 questions in both, 1 only in A, 0 only in B." in text
    assert "| episode.top_k | 3 | 5 |" in text and "wall_s" not in text
    assert "| train (all) | not used | used |" in text
    assert "| F1 | 0.000 | 1.000 | +1.000 | -0.044 to +1.000 | 5 | 0 | 0 | 5 |" in text
    assert "5 questions decide nothing, it takes 10." in text
    assert "F1 0.000 in A, 1.000 in B" in (tmp_path / "page.html").read_text()
    assert len(load(tmp_path / "a", tmp_path / "b").matched.pairs) == 5


def test_compare_sets_no_reward_against_a_reward_of_another_kind(tmp_path: Path) -> None:
    for name, rule in (("a", "paper"), ("b", "paper"), ("c", "composed")):
        evaluation(tmp_path / name, [result(n, "Ada") for n in range(5)], reward={"rule": rule}, **{"judge.url": None})
    names = [{metric.name for metric in load(tmp_path / "a", tmp_path / other).metrics} for other in ("b", "c")]
    assert "reward" in names[0] and names[0] - names[1] == {"reward"}


def test_compare_refuses_evaluations_of_different_questions(tmp_path: Path) -> None:
    evaluation(tmp_path / "a", [result(1, "Bob")])
    evaluation(tmp_path / "b", [result(2, "Ada")])
    with pytest.raises(DataError, match="share no question"):
        compare(tmp_path / "a", tmp_path / "b")


def test_compare_refuses_other_artifacts(context: Context) -> None:
    with pytest.raises(DataError, match="artifact of stage train"):
        compare(context.parent("baseline"), context.parent("train"))


def test_plain_text_is_escaped_everywhere(tmp_path: Path) -> None:
    (tmp_path / "all.html.j2").write_text(
        '{% extends "page.html.j2" %}{% from "macros.html.j2" import table %}{% block body %}'
        '<p title="{{ text }}">{{ text }}</p>{{ table((text, text), [(cell, text)]) }}'
        '<script type="application/json">{{ [text] | tojson }}</script>'
        "{% endblock %}"
    )
    text = EVIL + "\" onclick='x'"
    page = Page(html.render("all.html.j2", text, folder=tmp_path, text=text, cell=html.ColouredCell(text, "good")))
    assert set(page.tags) == EMPTY_PAGE | {"p", "div", "table", "thead", "tbody", "tr", "th", "td", "span"}
    assert page.addresses == [] and json.loads(page.scripts[0][1]) == [text]


def test_a_dev_question_stands_in_one_row_over_all_validated_steps() -> None:
    def row(step: int, question: str, score: float) -> dict[str, object]:
        return {"step": step, "question": question, "golds": ["Ada"], "rollout": 0, "score": score, **result(step, "Ada").trajectory}

    rows = [row(8, "moved", 1.0), row(0, "still", 0.1), row(0, "moved", 0.1), row(8, "still", 0.1)]
    first, second = validated(rows)
    assert [first["question"], second["question"]] == ["moved", "still"]
    assert [item["phase"] for item in first["items"]] == ["dev, after step 0", "dev, after step 8"]


def test_validations_are_read_apart_from_training(tmp_path: Path) -> None:
    (tmp_path / "rollouts" / "dev").mkdir(parents=True)
    (tmp_path / "rollouts" / "1.jsonl").write_text("{}\n")
    (tmp_path / "rollouts" / "dev" / "8.jsonl").write_text("{}\n")
    assert (list(rollout_files(tmp_path)), list(rollout_files(tmp_path, "dev"))) == ([1], [8])
