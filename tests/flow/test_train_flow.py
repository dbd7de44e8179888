"""research-train end to end with every real part: killed in the middle, resumed, recorded everywhere, then skipped."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SIZE, Trained, processes_of

from research_rl import config
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import STAGES, Workspace
from tasks.versioning import commit


def rows(database: Path, query: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_a_killed_run_leaves_no_process_behind(trained: Trained) -> None:
    assert trained.left_behind == []


def test_the_next_run_goes_on_from_the_last_saved_step(trained: Trained) -> None:
    assert 1 <= trained.steps_at_kill <= SIZE["train.steps"]
    space = Workspace(trained.root)
    lines = [json.loads(line) for line in (space.folder("train") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, SIZE["train.steps"] + 1))
    assert "View at" not in "".join(trained.logs), "the server of a run by hand, and its pages, end with the run"
    skipped = set(re.findall(r"'(\w+)' - Finished in state Cached", trained.logs[1]))
    assert {"policy", "download", "validate", "prepare", "corpus", "embed", "index", "baseline"} <= skipped
    assert not list(space.services.rglob("*.pid")) and processes_of(trained.root, trained.home) == []


def test_every_artifact_stands_and_fits_its_parents(trained: Trained) -> None:
    space, resolved = Workspace(trained.root), config.load(trained.root / "params.yaml")
    assert {name for name in STAGES if current(name, resolved, space) is None} == set()
    assert manifest.load(space.folder("report")).counts["questions"] == SIZE["evaluation.rows"]
    assert (space.folder("report") / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_prefect_shows_states_and_pictures(trained: Trained) -> None:
    database = trained.home / "prefect.db"
    states = {name for (name,) in rows(database, "select state_name from flow_run")}
    assert "Completed" in states
    keys = {key for (key,) in rows(database, "select key from artifact")}
    assert keys >= {
        "data-quality",
        "index-card",
        "baseline-evaluation",
        "evaluate-evaluation",
        "evaluation-report",
        "gate-decision",
        "training-curves",
        "run-summary",
    }
    (picture,) = {data for (data,) in rows(database, "select data from artifact where key = 'training-curves'")}
    assert json.loads(picture).startswith("data:image/png;base64,")
    (report,) = {data for (data,) in rows(database, "select data from artifact where key = 'evaluation-report'")}
    assert "/#/compare-runs?" in json.loads(report)


def test_mlflow_holds_lineage_steps_and_both_evaluations(trained: Trained) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("research-rl").experiment_id])  # type: ignore[union-attr]
    named = {run.info.run_name: run for run in runs if run.info.status == "FINISHED"}
    parents = [run for run in runs if str(run.info.run_name).startswith("train laptop steps=")]
    assert sorted(run.info.status for run in parents) == ["FINISHED", "KILLED"]
    finished = next(run for run in parents if run.info.status == "FINISHED")
    space = Workspace(trained.root)
    for name in STAGES:
        assert finished.data.tags[f"manifest.{name}"] == manifest.load(space.folder(name)).hash
    steps = client.get_metric_history(named["train"].info.run_id, "critic/rewards/mean")
    episodes = client.get_metric_history(named["train"].info.run_id, "episode/reward")
    assert [step.step for step in episodes] == list(range(1, SIZE["train.steps"] + 1))
    # verl logs a step after saving it: a kill between the two leaves that one step with its episodes' metrics only.
    assert len(steps) >= SIZE["train.steps"] - 1 and steps[-1].step == SIZE["train.steps"]
    for part in ("gen", "update_actor", "step"):
        assert len(client.get_metric_history(named["train"].info.run_id, f"timing_s/{part}")) == SIZE["train.steps"]
    before, after = named["baseline"].data.metrics, named["evaluate"].data.metrics
    assert {"em", "f1", "interval/f1_low", "interval/f1_high", "format", "searches"} <= before.keys()
    assert before.keys() - {"seconds"} == after.keys() - {"seconds"}
    evaluated = {run.data.tags.get("mlflow.runType") for run in runs if str(run.info.run_name).startswith(("before: ", "after: "))}
    assert evaluated == {"genai_evaluate"}
    assert client.search_traces(locations=[finished.info.experiment_id])


def test_dvc_has_nothing_left_to_do(trained: Trained) -> None:
    assert "up to date" in commit.dvc(trained.root, "status")
    assert "Running stage" not in commit.dvc(trained.root, "repro")


def test_a_third_run_skips_every_stage(trained: Trained) -> None:
    log = trained.run()
    assert set(re.findall(r"'(\w+)' - Finished in state Cached", log)) >= set(STAGES)
    assert trained.seconds[-1] < trained.seconds[0] / 2, "skipping every stage takes less than half of training from the first saved step"


@pytest.mark.parametrize(
    ("argument", "message"),
    [("train.stepz=3", "train.stepz is unknown; did you mean 'steps'?"), ("train", "is not of the form section.key=value")],
)
def test_a_wrong_parameter_is_one_message(trained: Trained, argument: str, message: str) -> None:
    before = (trained.root / "params.yaml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "flows.train", argument], cwd=trained.root, env=trained.env, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert (trained.root / "params.yaml").read_text() == before
