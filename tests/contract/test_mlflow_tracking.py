"""Tracking never holds a run up: MLflow gets everything when it is there, and later when it was not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Process, free_port, guarded
from tasks.tracking import sender, track
from tasks.tracking.journal import Place, read
from tasks.tracking.track import Tracker, journals

EPISODE: dict[str, Any] = {
    "question": "Who?",
    "golden_answers": ["Ann"],
    "stop": "answered",
    "engine_seconds": 0.2,
    "segments": [
        {"author": "model", "text": "<think> hm </think><search> who </search>", "tokens": 5},
        {"author": "search", "text": "<result> Ann. </result>", "tokens": 4},
        {"author": "model", "text": "<think> so </think><answer> Ann </answer>", "tokens": 5},
    ],
    "searches": [{"query": "who", "passage_ids": ["1"], "seconds": 0.1, "error": None}],
    "scores": {"f1": 1.0},
}


def artifact(stage: str) -> Manifest:
    return Manifest(stage=stage, config_hash="c", parents={"policy": "p"}, code_version="0", counts={"steps": 2}, facts={}, files=())


def play(space: Workspace, monkeypatch: pytest.MonkeyPatch, uri: str) -> Tracker:
    """Say what a short training run says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker.start(config.load_profile("laptop"), space, flow="research-train", run_id="0123456789")
    with tracker.stage("train", config.load_profile("laptop"), ("train",)) as run:
        for step in (1, 2):
            run.metrics({"reward/mean": step / 10, "not a (legal) name": 1.0}, step)
        run.traces([EPISODE])
        run.finished(artifact("train"), True)
        run.artifact(space.root / "params.yaml")
    return tracker


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    config.save(config.load_profile("laptop"), tmp_path / "params.yaml")
    journals(Workspace(tmp_path)).mkdir(parents=True)
    return Workspace(tmp_path)


def check(uri: str, place: Place) -> None:
    """The server holds the parent, the nested run, every step, the lineage, the artifact and the trace."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    parent, child = client.get_run(place.runs["flow"]), client.get_run(place.runs["train"])
    assert parent.data.params["train.steps"] == str(config.load_profile("laptop").train.steps)
    assert parent.data.tags["manifest.train"] == artifact("train").hash and parent.data.tags["prefect_flow_run_id"] == "0123456789"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id and child.data.tags["parent.policy"] == "p"
    assert [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, "reward/mean")] == [(1, 0.1), (2, 0.2)]
    assert child.data.metrics["not a _legal_ name"] == 1.0
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert [item.path for item in client.list_artifacts(child.info.run_id)] == ["params.yaml"]
    traces = client.search_traces(locations=[place.experiment])
    assert sorted(span.name for span in traces[0].data.spans) == sorted(["episode", "think", "search", "retrieve", "think", "answer"])
    assert traces[0].info.request_metadata["mlflow.sourceRun"] == child.info.run_id


def test_everything_reaches_a_sqlite_file_and_what_is_refused_is_skipped(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{space.root}/mlflow.db"
    tracker = play(space, monkeypatch, uri)
    tracker.journal.write("tags", key="flow", values={"": "an empty name is refused"})
    tracker.journal.write("metrics", key="nobody", step=1, values={"x": 1.0})
    tracker.tags("flow", {"after": "yes"})
    link = tracker.link("train", wait_s=60)
    assert tracker.close("FINISHED") and list(space.services.glob("*.pid")) == []
    place = Place.load(tracker.journal.folder)
    assert link == f"http://127.0.0.1:5000/#/experiments/{place.experiment}/runs/{place.runs['train']}"
    check(uri, place)
    from mlflow import MlflowClient

    assert MlflowClient(tracking_uri=uri).get_run(place.runs["flow"]).data.tags["after"] == "yes"


@pytest.fixture
def server(tmp_path: Path) -> tuple[str, Any]:
    """The address of a server, and a function that opens a block in which it runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "stored")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return url, lambda: guarded("mlflow", command, folder=tmp_path / "server", health_url=f"{url}/health", deadline_s=200, env=env)


def test_an_absent_server_costs_seconds_and_is_told_later(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    url, running = server
    monkeypatch.setattr(track, "PATIENCE_S", 1.0)
    tracker = play(space, monkeypatch, url)
    assert not tracker.close("FINISHED"), "nothing can have been sent"
    assert not Place.load(tracker.journal.folder).runs and len(read(tracker.journal.folder, 0)) > 5
    with running():
        done = subprocess.run(
            [sys.executable, "-m", "tasks.tracking.resend", "--workspace", str(space.root)], env={**os.environ, "MLFLOW_TRACKING_URI": url}
        )
        assert done.returncode == 0
        check(url, Place.load(tracker.journal.folder))


def kill(process: Process) -> None:
    """SIGKILL a server and everything it started, as a dying machine would."""
    tree = psutil.Process(process.popen.pid).children(recursive=True)
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=10)


def sent_steps(tracker: Tracker, uri: str) -> list[int]:
    from mlflow import MlflowClient

    run = Place.load(tracker.journal.folder).runs.get("train")
    return [metric.step for metric in MlflowClient(tracking_uri=uri).get_metric_history(run, "reward/mean")] if run else []


def test_a_server_absent_then_killed_then_back_ends_with_every_step_once(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Any]
) -> None:
    url, running = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setattr(track, "PATIENCE_S", 1.0)
    tracker = Tracker.start(config.load_profile("laptop"), space, flow="research-train", run_id="0123456789")
    slowest = 0.0

    def tell(run: track.StageRun, steps: range) -> None:
        nonlocal slowest
        for step in steps:
            started = time.monotonic()
            run.metrics({"reward/mean": step / 10}, step)
            slowest = max(slowest, time.monotonic() - started)

    with tracker.stage("train", config.load_profile("laptop"), ("train",)) as run:
        tell(run, range(1, 11))
        with running() as process:
            deadline = time.monotonic() + 120
            while not sent_steps(tracker, url) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert sent_steps(tracker, url), "the sender must find a server that comes late"
            tell(run, range(11, 16))
            kill(process)
        tell(run, range(16, 31))
    assert not tracker.close("FINISHED")
    assert slowest < 0.5, "a step must not wait for the server"
    with running():
        command = [sys.executable, "-m", "tasks.tracking.resend", "--workspace", str(space.root)]
        assert subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": url}).returncode == 0
        assert sent_steps(tracker, url) == list(range(1, 31))
        from mlflow import MlflowClient

        place = Place.load(tracker.journal.folder)
        named = [run.info.run_name for run in MlflowClient(tracking_uri=url).search_runs([place.experiment])]
        assert sorted(map(str, named)) == ["research-train-01234567", "train"], "no run may be made twice"


def test_a_policy_is_registered_once_with_its_lineage(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{space.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = space.root / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for number in ("1", "2"):
        tracker = Tracker.start(config.load_profile("laptop"), space, flow="research-train", run_id=f"{number}-run")
        with tracker.stage("train", config.load_profile("laptop"), ("train",)) as run:
            attempt = run.child("attempt-1", {"resumed_from_step": "0"})
            attempt.tags({"ended": "was killed"})
            attempt.end("FAILED")
        with tracker.stage("export", config.load_profile("laptop"), ()) as run:
            run.register(model, "research-rl", {"manifest": "abc", "parent.train": "t"})
            run.alias("research-rl", "abc", "champion")
            run.alias("research-rl", "unknown", "champion")
        assert tracker.close("FINISHED")
    client = MlflowClient(tracking_uri=uri)
    versions = client.search_model_versions("name = 'research-rl'")
    assert len(versions) == 1 and versions[0].tags == {"manifest": "abc", "parent.train": "t"}
    full = client.get_registered_model("research-rl")
    assert full.aliases == {"candidate": versions[0].version, "champion": versions[0].version}
    assert [item.path for item in client.list_artifacts(versions[0].run_id, "model")] == ["model/config.json"]
    place = Place.load(tracker.journal.folder)
    nested = client.get_run(place.runs["train/attempt-1"])
    assert nested.data.tags["mlflow.parentRunId"] == place.runs["train"]
    assert (nested.info.run_name, nested.info.status, nested.data.tags["ended"]) == ("attempt-1", "FAILED", "was killed")


def test_a_journal_of_a_killed_flow_ends_as_killed(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{space.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker.start(config.load_profile("laptop"), space, flow="research-train", run_id="dead")

    def lose() -> None:
        with tracker.stage("train", config.load_profile("laptop"), ("train",)) as run:
            run.metrics({"reward": 1.0}, 1)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        lose()
    assert tracker.sender
    tracker.sender.stop()
    assert sender.send_all(journals(space), live=None) == 0
    from mlflow import MlflowClient

    place = Place.load(tracker.journal.folder)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(place.runs["flow"]).info.status == "KILLED"
    failed = client.get_run(place.runs["train"])
    assert failed.info.status == "FAILED" and failed.data.tags["error"] == "RuntimeError: out of memory"


def test_this_module_of_the_flow_never_imports_mlflow() -> None:
    started = time.monotonic()
    code = "import sys, flows.train; sys.exit('mlflow' in sys.modules or 'great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0
    assert time.monotonic() - started < 60
