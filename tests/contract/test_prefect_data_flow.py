"""The flow research-data on a real Prefect server: it builds, skips, shows, and refuses bad data without a second try."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import prefect
import pytest
import yaml
from prefect import get_client
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun

from flows.data import research_data
from research_rl import config
from research_rl.data import download
from research_rl.errors import ConfigError, DataError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline import stages as pipeline
from research_rl.pipeline.lock import locked
from research_rl.pipeline.stages import Context, Workspace
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.watch import Finding
from research_rl.validation.stage import QualityError
from tasks import stage
from tasks.job import Job, opened
from tasks.stage import Progress, stage_task
from tasks.tracking import track
from tasks.tracking.journal import TrackingJournal, read
from tasks.tracking.track import StageRun, Tracker, journals
from tasks.train import Watcher
from tasks.versioning import commit
from tests import defects
from tests.databases import lay_mlflow
from tests.prefect_server import harness

SMALL: dict[str, Any] = {
    "data.generated.entities": 60,
    "data.generated.train_questions": 64,
    "data.generated.dev_questions": 8,
    "data.generated.test_questions": 16,
}
STAGES = ("download", "validate", "prepare", "corpus", "embed", "index")


@pytest.fixture(scope="module", autouse=True)
def server() -> Generator[None]:
    with harness():
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    lay_mlflow(folder / "mlflow.db")
    return folder


def last_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return max(client.read_flow_runs(), key=lambda run: run.created)  # type: ignore[arg-type, return-value]


def states(run: FlowRun) -> dict[str, str]:
    """Return the state's name of every task of a run."""
    with get_client(sync_client=True) as client:
        task_runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    return {item.name: str(item.state_name) for item in task_runs}


def followed(run: FlowRun) -> dict[str, set[str]]:
    """Return for every task of a run the tasks that an edge of Prefect's graph leads from."""
    with get_client(sync_client=True) as client:
        task_runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    names = {str(item.id): item.name for item in task_runs}
    inputs = {item.name: [entry for entries in item.task_inputs.values() for entry in entries] for item in task_runs}
    return {name: {names[str(entry.id)] for entry in entries if hasattr(entry, "id")} for name, entries in inputs.items()}


def artifacts(run: FlowRun) -> set[str]:
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    return {str(item.key) for item in shown}


def test_it_builds_shows_and_commits(workspace: Path) -> None:
    research_data(workspace=str(workspace), overrides=SMALL)
    run = last_run()
    assert (run.state_name, run.name) == ("Completed", "research-data laptop seed 42")
    edges = {"validate": {"download"}, "corpus": {"download", "validate"}, "embed": {"corpus"}, "index": {"corpus", "embed"}}
    assert edges.items() <= followed(run).items()
    assert states(run) == {**dict.fromkeys(STAGES, "Completed"), "dvc-commit": "Completed", "summary": "Completed"}
    assert artifacts(run) >= {"data-quality", "index-card", "run-summary"}
    assert config.load(workspace / "params.yaml").data.generated.entities == 60
    assert "up to date" in commit.dvc(workspace, "status", "data.dvc", *STAGES[1:])


def test_a_second_run_skips_everything_and_a_parameter_reruns_what_depends_on_it(workspace: Path) -> None:
    research_data(workspace=str(workspace))
    with get_client(sync_client=True) as client:
        task_runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[last_run().id])))
    said = {item.name: str(item.state.message) for item in task_runs if item.state}
    assert all(said[name].startswith(f"{name} is current and was skipped: ") for name in STAGES)
    assert states(last_run()) == {**dict.fromkeys(STAGES, "Cached"), "dvc-commit": "Cached", "summary": "Completed"}
    research_data(workspace=str(workspace), overrides={"encoder.dim": 64})
    after = states(last_run())
    assert {name for name in STAGES if after[name] == "Completed"} == {"embed", "index"}


def test_a_weekly_run_ends_at_once_where_nothing_changed_and_brings_what_did(tmp_path: Path) -> None:
    lay_mlflow(tmp_path / "mlflow.db")
    named = {split: [f"s/{split}.jsonl"] for split in ("train", "dev", "test")}
    source = tmp_path / "source/s"
    source.mkdir(parents=True)
    for name, rows in defects.snapshot().items():
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {f"data.{split}": names for split, names in named.items()} | {"data.source": "folder", "data.folder": "source"}
    weekly: dict[str, Any] = {"workspace": str(tmp_path), "overrides": {**overrides, "data.corpus": "s/corpus.jsonl"}, "refresh": True}
    research_data(**weekly)
    assert states(last_run()) == {**dict.fromkeys(STAGES, "Completed"), "dvc-commit": "Completed", "summary": "Completed"}
    research_data(**weekly)
    assert states(last_run()) == {"download": "Cached", "dvc-commit": "Cached", "summary": "Completed"}
    lines = (source / "corpus.jsonl").read_text().splitlines()
    (source / "corpus.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    research_data(**weekly)
    found = states(last_run())
    assert {found[name] for name in ("download", "validate", "corpus", "embed", "index", "dvc-commit")} == {"Completed"}
    made = Workspace(tmp_path)
    changes = pipeline.measured(made, manifest.load(made.folder("embed")))
    assert (changes["added"], changes["changed"], changes["removed"]) == (0, 0, 1)


def test_the_weekly_deployment_asks_the_sources() -> None:
    """Without it a download is current as long as its configuration is, whatever the source holds."""
    deployments = {item["name"]: item for item in yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]}
    assert deployments["weekly"]["parameters"]["refresh"] is True
    assert "refresh" in research_data.parameters.properties


def test_deployments_react_to_events_that_are_raised_only_where_a_user_turned_that_on() -> None:
    deployments = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]
    (found,) = [item for item in deployments if item.get("triggers")]
    (trigger,) = _initialize_deployment_triggers(found["name"], found["triggers"])
    assert not trigger.enabled and found["name"] == "weekly-challenger"
    assert all(f'"{event}"' in (CHECKOUT / "tasks/evaluation/night.py").read_text() for event in found["triggers"][0]["expect"])


def table(run: FlowRun, key: str) -> list[dict[str, Any]]:
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    return next(json.loads(item.data) if isinstance(item.data, str) else item.data for item in shown if item.key == key)  # type: ignore[return-value]


def test_bad_data_fails_once_shows_its_rows_and_publishes_nothing(tmp_path: Path) -> None:
    data = defects.snapshot()
    for _, _, spoil in defects.DEFECTS.values():
        spoil(data)
    overrides = {"data.source": "folder", "data.folder": str(defects.write(data, tmp_path / "source"))}
    with pytest.raises(QualityError) as caught:
        research_data(workspace=str(tmp_path / "work"), overrides=overrides)
    message = str(caught.value)
    assert "test: expect_column_values_to_be_between(leaked, max_value=0.0) observed 1 of 40 rows differ" in message
    assert "line 1, id test120, text Which banner flies in the square of Village0" in message
    run = last_run()
    assert run.state_name == "Failed" and states(run)["validate"] == "Failed"
    shown = {(row["suite"], row["column"]): row["first rows"] for row in table(run, "data-quality") if row["result"] == "critical"}
    assert shown.keys() >= {(suite, column) for suite, column, _ in defects.DEFECTS.values()}
    assert "nearly train line 2" in shown["test", "near"] and "line 4, id train3" in shown["train", "echo"]
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    assert [task.run_count for task in tasks if task.name.startswith("validate")] == [1], "a data error is not worth another try"
    space = Workspace(tmp_path / "work")
    assert not space.folder("validate").exists() and manifest.load(space.folder("download"))
    assert (space.work("data-docs") / "summary.html").is_file()
    assert not list(space.services.glob("*.pid"))


def test_the_form_describes_every_parameter() -> None:
    from flows.bench import research_bench
    from flows.evaluate import research_eval
    from flows.train import research_train

    for flow in (research_data, research_train, research_eval, research_bench):
        properties = flow.parameters.model_dump()["properties"]
        assert all(item.get("description") for item in properties.values()), flow.name
    form = research_train.parameters.model_dump()["properties"]
    assert form["profile"]["anyOf"][0]["enum"] == config.profiles()
    assert form["force"]["items"]["enum"] == list(pipeline.STAGES)
    numbers = {
        flow.name: typed_fields(flow.parameters.model_dump()["properties"]) for flow in (research_train, research_eval, research_bench)
    }
    assert numbers == {"research-train": ["seed", "steps"], "research-eval": ["seed"], "research-bench": ["seed"]}


def typed_fields(form: dict[str, Any]) -> list[str]:
    """Return the fields that take a whole number or stay empty."""
    kinds = {name: [kind["type"] for kind in item.get("anyOf", ())] for name, item in form.items()}
    return sorted(name for name, found in kinds.items() if found == ["integer", "null"] and form[name].get("default") is None)


def test_a_field_of_the_form_is_written_to_params_yaml_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run itself is cut short: what it would have built is not what this is about."""
    from flows import evaluate

    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")

    def begun(job: Job, stages: object) -> NoReturn:
        job.on_build()
        raise DataError("far enough")

    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    monkeypatch.setattr(evaluate, "retriever", begun)
    monkeypatch.setattr(logging.getLogger("prefect.flow_runs"), "handlers", [caplog.handler])
    with pytest.raises(DataError, match="far enough"):
        evaluate.research_eval(workspace=str(tmp_path), seed=7, overrides={"evaluation.rows": 8})
    found = config.load(tmp_path / "params.yaml")
    assert (found.evaluation.seed, found.evaluation.rows, found.seed) == (7, 8, 42)
    assert "evaluation.seed 17 -> 7, written to params.yaml" in caplog.messages
    with pytest.raises(ConfigError, match=r"seed=7 and overrides both set evaluation\.seed"):
        evaluate.research_eval(workspace=str(tmp_path), seed=7, overrides={"evaluation.seed": 8})


def test_a_stage_that_runs_beside_a_failing_one_has_ended_before_the_run_gives_up_workspace_and_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    entered = threading.Event()

    def slow(context: Context, run: StageRun) -> None:
        run.tags({"policy": "begun"})
        entered.set()
        while True:  # only the end of the run ends it
            context.progress("warming up", 0.5)
            time.sleep(0.01)

    @prefect.flow
    def failing() -> None:
        with opened(str(tmp_path), "laptop", {}, flow="research-train", run_id="beside") as job:
            job.submit(stage_task("policy", build=slow))
            assert entered.wait(60)
            raise DataError("the download failed")

    with pytest.raises(DataError, match="the download failed"):
        failing()
    (journal,) = (folder for folder in journals(Workspace(tmp_path)).iterdir() if folder.is_dir())
    events = [(event["op"], event.get("key"), event.get("status")) for _, event in read(journal, 0)]
    assert events[-2:] == [("end", "policy", "FAILED"), ("close", None, "FAILED")]
    assert states(last_run()) == {"policy": "Cancelled"}
    with locked(Workspace(tmp_path), 0.0):
        pass


def test_progress_that_was_shown_ends_at_100_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.stage._UPDATE_S", 0.0)

    @prefect.flow
    def showing() -> None:
        progress = Progress("index", print)
        progress("93 of 100", 0.93)
        progress.finish()

    showing()
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[last_run().id])))
    assert [item.data for item in shown if item.key == "index-progress"] == [100.0]


def test_a_finding_of_the_watch_is_an_artifact_and_tags(tmp_path: Path) -> None:
    finding = Finding("kl_step", 9, 8, 3, 0.7, 0.2, "kl_step: KL of one update is 0.7", "lower train.lr", "stop", True)
    tracker = Tracker(TrackingJournal(tmp_path), None, "sqlite:///none")

    @prefect.flow
    def stopping() -> None:
        Watcher(StageRun(tracker, "train", {})).on_finding(finding, Checkpoint(4, tmp_path / "good/global_step_4"))

    stopping()
    assert "collapse-watch" in artifacts(last_run())
    tags = {name: value for _, event in read(tmp_path, 0) if event["op"] == "tags" for name, value in event["values"].items()}
    assert tags == {"watch.kl_step": f"step 9: {finding.text}", "collapse": f"step 9: {finding.text}", "collapse.good_step": "4"}


def run_one_stage(folder: Path, errors: list[Exception]) -> FlowRun:
    """Run the stage `download` as a real Prefect task whose first tries fail with `errors`, one each."""
    remaining = list(errors)
    lay_mlflow(folder / "mlflow.db")

    def build(context: Context, run: StageRun) -> None:
        if remaining:
            raise remaining.pop(0)
        download.run(context)

    task = stage_task("download", build=build)

    @prefect.flow
    def one_stage() -> None:
        with opened(str(folder), "laptop", SMALL, flow="one-stage", run_id="one-stage") as job:
            task(job)

    one_stage(return_state=True)
    return last_run()


@pytest.mark.parametrize(
    ("errors", "state", "tries"),
    [
        ([ServiceError("the store restarts"), ConnectionResetError("cut")], "Completed", 3),
        ([ServiceError("the store is gone")] * 4, "Failed", 3),
        ([ConfigError("data.folder='x' does not exist")], "Failed", 1),
        ([KeyError("a fault of the program")], "Failed", 1),
    ],
    ids=["passing trouble", "lasting trouble", "wrong parameter", "fault of the program"],
)
def test_a_task_is_tried_again_after_a_services_failure_alone(
    errors: list[Exception], state: str, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BACKOFF_S", 0.01)
    run = run_one_stage(tmp_path / "work", errors)
    with get_client(sync_client=True) as client:
        (attempt,) = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    assert (run.state_name, attempt.state_name, attempt.run_count) == (state, state, tries)
    assert (tmp_path / "work" / "data" / "manifest.json").is_file() == (state == "Completed")
