"""An evaluation stands among MLflow's datasets, prompts, logged models and evaluation rows, once, however often it is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from research_rl import config
from research_rl.evaluation import judging
from research_rl.evaluation.cells import Model
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.judge_metrics import measure
from research_rl.evaluation.judge_presets import PRESETS
from research_rl.evaluation.judging import Judged, Judgement, Protocol
from research_rl.evaluation.results import read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from tasks import artifacts
from tasks.artifacts import _brought, _headline, _verdict
from tasks.evaluation import bench
from tasks.evaluation.to_mlflow import FIRST, Evaluation, _prompt, track
from tasks.job import StageOutcome
from tasks.tracking import judgements, sender
from tasks.tracking.experiment import COLUMNS, VIEW
from tasks.tracking.journal import Place, TrackingJournal, read
from tasks.tracking.sender import _Sender
from tasks.tracking.track import StageRun, Tracker, journals, run_title
from tests.mlflow_server import mlflow_server
from tests.results import lost, played, standing

CONFIG = config.load_profile("laptop", {"tracking.traces": 8, "evaluation.bootstrap": 100})
PROMPT = _prompt(CONFIG)["name"]
SEARCHES = [("who wrote it", "Ada\nAda wrote it."), ("where", "")]


def parent(stage: str) -> Manifest:
    return Manifest(stage=stage, config_hash="c", parents={}, code_version="0", counts={}, facts={}, files=())


def evaluated(folder: Path, right: int) -> Manifest:
    """Publish an evaluation of two question sets, six questions in one and two in the other, of which the first `right` are answered."""
    answers = ["Ada" if row < right else "Bob" for row in range(5)]
    results = [played(row, answer, SEARCHES, source="made") for row, answer in enumerate(answers)]
    results += [lost(5), played(6, "Ada", source="other"), played(7, "Bob", source="other")]
    parents = {"index": parent("index"), "corpus": parent("corpus")}
    with manifest.publish(folder, "evaluate", f"c{right}", parents) as staging:
        write_evaluation(staging, CONFIG, results, {})
    return manifest.load(folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The address of a server that runs for all tests of this file."""
    address, running = mlflow_server(tmp_path_factory.mktemp("mlflow"))
    with running():
        yield address


def opened(space: Workspace, name: str, experiment: str) -> Tracker:
    """A run that writes its journal while nobody sends it."""
    tracker = Tracker(TrackingJournal(journals(space) / name), None, "")
    title = run_title("research-train", CONFIG)
    tags = {"flow": "research-train"}
    tracker.journal.write("open", name=title, experiment=experiment, uri="", artifacts=str(space.root / "stored"), tags=tags, params={})
    return tracker


def judge(root: Path, evaluation: Path, verdicts: dict[int, bool | None], model: str = "a judge", preset: str = "research") -> Path:
    """Publish a judgement with these verdicts by row, None where the judge failed, as `research judge` leaves it."""
    asked = {result.row: result for result in read_results(evaluation)}
    judged = [Judged.of(asked[row], correct=right, rationale="the same", served=f"{model}-1") for row, right in verdicts.items()]
    found, protocol = manifest.load(evaluation), Protocol(PRESETS[preset], model)
    judgement = Judgement(evaluation, protocol, judging._hash(protocol, found), root)
    with manifest.publish(judgement.folder, judging.STAGE, judgement.hash, {found.stage: found}, protocol.parameters) as staging:
        (staging.path / judging.VERDICTS).write_text("".join(json.dumps(asdict(item)) + "\n" for item in judged))
        (staging.path / judging.METRICS).write_text(json.dumps(measure(judged, 100, 1)))
    return judgement.folder


def tell(space: Workspace, experiment: str, verdicts: dict[int, bool | None] | None = None) -> Tracker:
    """Write the journal of a run that evaluated a policy before and after training, and judged both where there are verdicts."""
    tracker = opened(space, f"1-{experiment}", experiment)
    training = StageRun(tracker, "train", {})
    training.traces([{**played(0, "Ada", SEARCHES).trajectory, "question": "Q?", "golden_answers": ["Ada"], "scores": {"reward": 1.0}}])
    for stage, model, right in (("baseline", "before", 1), ("evaluate", "after", 4)):
        folder = space.root / stage
        made = evaluated(folder, right)
        run = StageRun(tracker, stage, {})
        judgements = [judge(space.root, folder, verdicts)] if verdicts else []
        track(run, CONFIG, space.root, Evaluation(folder, made, model, f"policy-{model}", judgements=judgements))
        run.end("FINISHED")
        tracker.remember(made)
    tracker.journal.write("close", status="FINISHED")
    return tracker


def send(tracker: Tracker) -> Place:
    assert sender.send_all(tracker.journal.folder.parent, live=None) == 0
    place = Place.load(tracker.journal.folder)
    assert place.refused == 0, "MLflow refused an event, see the log"
    return place


def everything(client: MlflowClient, place: Place) -> dict[str, Any]:
    """What MLflow holds of an experiment, in numbers that a second sending must not change."""
    experiment = [place.experiment]
    traces = client.search_traces(locations=experiment)
    return {
        "runs": len(client.search_runs(experiment)),
        "datasets": sorted((found.name, len(found.records)) for found in client.search_datasets(experiment)),
        "models": len(client.search_logged_models(experiment)),
        "prompts": len(client.search_prompt_versions(PROMPT)),
        "traces": len(traces),
        "assessments": sorted(len(trace.info.assessments) for trace in traces),
    }


def test_an_evaluation_is_in_every_view_and_a_second_sending_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    tracker = tell(Workspace(tmp_path), "views")
    place = send(tracker)
    client = MlflowClient(tracking_uri=url)
    mlflow.set_tracking_uri(url)

    names = {key.rpartition("/")[2] for key in place.runs}
    assert {"before: research on made", "before: research on other", "after: research on made", "after: research on other"} <= names
    run = client.get_run(place.runs["evaluate/after: research on made"])
    assert run.data.tags["mlflow.parentRunId"] == place.runs["evaluate"] and run.info.status == "FINISHED"
    assert run.data.tags["mlflow.runType"] == "genai_evaluate", "MLflow's evaluation view lists runs of this type"
    plain = {name for name in run.data.metrics if "/" not in name}
    assert plain <= set(FIRST) and {"em", "f1", "reward"} <= plain, "the numbers that are read first, and no other, have plain names"
    assert run.data.metrics["em"] == pytest.approx(4 / 6) and run.data.metrics["interval/em_low"] < 4 / 6

    (dataset,) = [each for each in client.search_datasets([place.experiment]) if each.name.startswith("made-")]
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == [dataset.name]
    record = next(each for each in dataset.records if each.inputs["question"] == "Question 0?")
    assert record.expectations == {"golden_answers": ["Ada"], "expected_response": "Ada"}

    models = client.search_logged_models([place.experiment])
    after = next(each for each in models if each.tags["policy"] == "policy-after")
    on_model = {metric.key: metric for metric in after.metrics if metric.dataset_name == dataset.name}
    assert on_model["em"].value == pytest.approx(4 / 6), "what was measured hangs on policy, index and prompt, by question set"
    assert after.params["index"] and after.params["prompt"] == f"prompts:/{PROMPT}/1"
    (prompt,) = client.search_prompt_versions(PROMPT)
    assert "{{question}}" in prompt.template

    rows = [
        trace
        for trace in client.search_traces(locations=[place.experiment])
        if trace.info.request_metadata["mlflow.sourceRun"] == run.info.run_id
    ]
    assert len(rows) == 6, "a row a question, lost ones included"
    assert {json.loads(trace.data.request)["question"] for trace in rows} == {f"Question {row}?" for row in range(6)}
    row = next(trace for trace in rows if json.loads(trace.data.request)["question"] == "Question 0?")
    found = {item.name: item for item in row.info.assessments}
    assert {"em", "f1", "reward", "searches", "golden_answers", "expected_response"} == found.keys()
    assert found["em"].feedback.value == 1.0 and found["golden_answers"].expectation.value == ["Ada"]
    assert found["em"].metadata["mlflow.assessment.sourceRunId"] == run.info.run_id
    retrieved = [span for span in row.data.spans if span.span_type == "RETRIEVER"]
    assert retrieved[0].outputs == [{"page_content": "Ada\nAda wrote it.", "metadata": {"doc_uri": "p0"}, "id": "p0"}]
    assert retrieved[1].outputs == [], "a search that found nothing has no document"
    assert row.info.token_usage["output_tokens"] > 0 and row.info.token_usage["input_tokens"] > 2

    before = everything(client, place)
    assert before["datasets"] == [(dataset.name, 6), *[(name, 2) for name, _ in before["datasets"] if name.startswith("other-")]]
    assert (before["models"], before["prompts"], before["traces"]) == (2, 1, 17), "an episode of training, and 16 rows"
    # As after a place that was lost.
    Place(experiment=place.experiment, uri=place.uri, doubted=True).save(tracker.journal.folder)
    assert everything(client, send(tracker)) == before, "an event that comes twice must make nothing twice"


def test_a_try_that_was_cut_in_the_middle_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from tasks.tracking import evaluations

    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    tracker = tell(Workspace(tmp_path), "cut")
    journal = _Sender(tracker.journal.folder, 0.0, live=False)
    # The process ends among the rows: some traces are there, the run does not have them.
    whole = evaluations._require_all
    monkeypatch.setattr(evaluations, "_require_all", lambda to, count: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        journal._send(read(tracker.journal.folder, 0))
    monkeypatch.setattr(evaluations, "_require_all", whole)
    place = send(tracker)
    held = everything(MlflowClient(tracking_uri=url), place)
    assert held["traces"] == 17 and held["models"] == 2 and held["assessments"] == [3, *[6] * 16]


def test_rows_of_an_evaluation_that_was_replaced_are_not_sent_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    tracker = tell(Workspace(tmp_path), "replaced")
    shutil.rmtree(tmp_path / "baseline")
    evaluated(tmp_path / "baseline", 2)
    place = send(tracker)
    assert everything(MlflowClient(tracking_uri=url), place)["traces"] == 9 and "no longer holds evaluation" in caplog.text


def test_a_judges_verdict_is_an_assessment_with_its_rationale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    place = send(tell(Workspace(tmp_path), "judged", {0: True, 1: None}))
    judged = verdicts_in(url, place)
    assert [(item.feedback.value, item.rationale, item.source.source_id) for _, item in judged] == [(True, "the same", "a judge-1")] * 2
    assert {question for question, _ in judged} == {"Question 0?"}
    assert judged[0][1].metadata["research.preset"] == "research" and judged[0][1].source.source_type == "LLM_JUDGE"


def verdicts_in(url: str, place: Place) -> list[tuple[str, Any]]:
    """Return the judges' verdicts that MLflow holds in an experiment, each with its question."""
    traces = MlflowClient(tracking_uri=url).search_traces(locations=[place.experiment])
    found = [(trace, item) for trace in traces for item in trace.info.assessments if item.name == "judge"]
    return sorted(((json.loads(trace.data.request)["question"], item) for trace, item in found), key=lambda each: each[0])


def test_a_judgement_of_an_evaluation_that_mlflow_has_comes_to_its_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    space, passed_on = Workspace(tmp_path), ["--workspace", str(tmp_path)]
    place = send(tell(space, "judged later"))
    # The experiment of the present parameters is another one than the evaluation went to.
    config.update(CONFIG, tmp_path / "params.yaml")
    first = judge(tmp_path, tmp_path / "evaluate", {0: True, 1: False, 2: None})
    assert judgements.main(passed_on) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == {"judgements": 1}
    assert [(question, item.feedback.value) for question, item in verdicts_in(url, place)] == [
        ("Question 0?", True),
        ("Question 1?", False),
    ]
    (run,) = [
        run for run in MlflowClient(tracking_uri=url).search_runs([Place.load(newest(space)).experiment]) if "judge" in run.info.run_name
    ]
    assert run.data.metrics["judge/accuracy"] == pytest.approx(1 / 3) and run.data.metrics["judge/published_accuracy"] == 0.5
    assert judgements.main(passed_on) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == {"judgements": 0}
    # Asked again about the failure, and told as if nothing had been told: only what is new comes to the rows.
    shutil.rmtree(first)
    judge(tmp_path, tmp_path / "evaluate", {0: True, 1: False, 2: True})
    (journals(space) / "judged.json").unlink()
    assert judgements.main(passed_on) == 0
    assert [item.feedback.value for _, item in verdicts_in(url, place)] == [True, False, True]
    judge(tmp_path, tmp_path / "evaluate", {0: False}, model="another judge")
    assert judgements.main(passed_on) == 0
    assert [item.feedback.value for question, item in verdicts_in(url, place) if question == "Question 0?"] == [True, False]


def newest(space: Workspace) -> Path:
    return max(path for path in journals(space).iterdir() if path.name.endswith("-judgement"))


def test_a_judgement_waits_for_a_silent_mlflow_and_for_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    space, passed_on = Workspace(tmp_path), ["--workspace", str(tmp_path)]
    tracker = tell(space, "judged before it was sent")
    config.update(CONFIG, tmp_path / "params.yaml")
    judge(tmp_path, tmp_path / "evaluate", {0: True})
    with monkeypatch.context() as silent:
        silent.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        silent.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert judgements.main(passed_on) == 3 and "MLflow takes no verdicts now" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    assert not _Sender(newest(space), 0.0, live=False).run(), "its evaluation has not been sent"
    assert [item.feedback.value for _, item in verdicts_in(url, send(tracker))] == [True]


def test_a_workspace_whose_evaluations_mlflow_was_not_told_of_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "evaluate", 2)
    judge(tmp_path, tmp_path / "evaluate", {0: True})
    assert judgements.main(["--workspace", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"judgements": 0} and not journals(Workspace(tmp_path)).exists()


def test_an_evaluation_takes_the_judgements_along_that_it_had_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = opened(Workspace(tmp_path), "1-told", "x")
    job: Any = SimpleNamespace(config=CONFIG, workspace=SimpleNamespace(root=tmp_path, folder=lambda stage: tmp_path / stage))
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda *_, **__: None)
    with manifest.publish(tmp_path / "evaluate", "evaluate", "c", {"export": parent("export")}) as staging:
        write_evaluation(staging, CONFIG, [played(0, "Ada")], {})
    table, run = manifest.load(tmp_path / "evaluate"), StageRun(tracker, "evaluate", {})
    first = judge(tmp_path, tmp_path / "evaluate", {0: True})
    run.fresh = True
    artifacts.evaluation_table(job, table, run)
    cell = standing(tmp_path, Model("before", tmp_path, "m" * 64), "research", [played(0, "Ada")])
    second = judge(tmp_path, cell.cell.folder, {0: True})
    bench._track(StageRun(tracker, "bench", {}), job, [cell])
    told = [event["evaluation"]["judgements"] for _, event in read(tracker.journal.folder, 0) if event["op"] == "evaluation"]
    assert told == [[str(first)], [str(second)]]


def test_an_experiment_says_what_it_holds_and_keeps_what_a_person_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    client = MlflowClient(tracking_uri=url)
    for number in (1, 2):
        tracker = opened(Workspace(tmp_path), f"{number}-dressed", "dressed")
        tracker.journal.write("close", status="FINISHED")
        place = send(tracker)
        tags = client.get_experiment(place.experiment).tags
        if number == 1:
            assert f"viewStateShareKey={VIEW}" in tags["mlflow.note.content"]
            client.set_experiment_tag(place.experiment, "mlflow.note.content", "mine")
    assert tags["mlflow.note.content"] == "mine"
    state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])["state"])
    assert state["selectedColumns"] == list(COLUMNS) and len(state["compareRunCharts"]) == 8
    assert client.get_run(place.runs["flow"]).info.run_name == f"train laptop steps={CONFIG.train.steps} seed=42"


def test_the_columns_of_the_view_are_what_the_parent_run_carries() -> None:
    change = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 96}
    facts = {"before": {"f1": 0.25, "em": 0.25}, "after": {"f1": 0.75, "em": 0.75}, "difference": {"f1": change, "em": change}}
    facts["train"] = {"steps": 26, "reward_first": 0.1, "reward_last": 0.9}
    outcomes = {"train": StageOutcome(parent("train"), True, 9.0), "index": StageOutcome(parent("index"), False, 1.0)}
    carried = _headline(facts) | _brought(facts, outcomes)
    assert carried["seconds"] == 9.0 and carried["steps"] == 26 and carried["reward"] == 0.9 and _verdict(facts) == "better"
    shown = {column.split("`")[1] for column in COLUMNS if column.startswith("metrics.")}
    assert shown <= carried.keys()
