"""Tracking never holds a run up: MLflow gets everything when it is there, and later when it was not."""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from research_rl import config
from research_rl.evaluation.intervals import FEWEST
from research_rl.paths import CHECKOUT
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Process
from tasks.artifacts import _headline, _verdict
from tasks.tracking import sender, track
from tasks.tracking.journal import EVENTS, Place, TrackingJournal, read
from tasks.tracking.registry import moves
from tasks.tracking.track import Tracker, journals, tracking_uri
from tests.databases import lay_mlflow
from tests.mlflow_server import mlflow_server
from tests.waiting import PATIENCE_S, until

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
    lay_mlflow(tmp_path / "mlflow.db")
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
    assert place.refused == 2, "the tag without a name and the metrics of a run that nobody opened"
    assert link == f"http://127.0.0.1:5000/#/experiments/{place.experiment}/runs/{place.runs['train']}"
    check(uri, place)
    from mlflow import MlflowClient

    assert MlflowClient(tracking_uri=uri).get_run(place.runs["flow"]).data.tags["after"] == "yes"


@pytest.fixture
def server(tmp_path: Path) -> tuple[str, Any]:
    """The address of a server, and a function that opens a block in which it runs."""
    return mlflow_server(tmp_path)


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
    seconds: list[float] = []

    def tell(run: track.StageRun, steps: range) -> None:
        for step in steps:
            started = time.monotonic()
            run.metrics({"reward/mean": step / 10}, step)
            seconds.append(time.monotonic() - started)

    with tracker.stage("train", config.load_profile("laptop"), ("train",)) as run:
        tell(run, range(1, 11))
        with running() as process:
            assert until(lambda: sent_steps(tracker, url)), "the sender must find a server that comes late"
            tell(run, range(11, 16))
            kill(process)
        tell(run, range(16, 31))
    assert not tracker.close("FINISHED")
    assert statistics.median(seconds) < 0.5, "a step must not wait for the server"
    with running():
        command = [sys.executable, "-m", "tasks.tracking.resend", "--workspace", str(space.root)]
        assert subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": url}).returncode == 0
        assert sent_steps(tracker, url) == list(range(1, 31))
        from mlflow import MlflowClient

        place = Place.load(tracker.journal.folder)
        named = [run.info.run_name for run in MlflowClient(tracking_uri=url).search_runs([place.experiment])]
        assert len(named) == 2 and "train" in named, "no run may be made twice"
        assert any(name == f"train laptop steps={config.load_profile('laptop').train.steps} seed=42" for name in named)


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
            run.describe("research-rl", "abc", "F1 0.100 before", {"f1_after": "0.9"})
            run.describe("research-rl", "unknown", "-", {})
            run.promote("research-rl", "abc", None, "a test", "it is better")
            run.promote("research-rl", "unknown", None, "a test", "nobody knows it")
        assert tracker.close("FINISHED")
    client = MlflowClient(tracking_uri=uri)
    versions = client.search_model_versions("name = 'research-rl'")
    assert len(versions) == 1
    tags = versions[0].tags
    moved = {name: tags.pop(name) for name in [*tags] if name.startswith("champion.")}
    assert tags == {"manifest": "abc", "parent.train": "t", "f1_after": "0.9"}
    assert (moved["champion.who"], moved["champion.why"], moved["champion.before"]) == ("a test", "it is better", "none")
    assert versions[0].description == "F1 0.100 before"
    full = client.get_registered_model("research-rl")
    assert full.aliases == {"candidate": versions[0].version, "champion": versions[0].version}
    assert [item.path for item in client.list_artifacts(versions[0].run_id, "model")] == ["model/config.json"]
    assert [made.reason.why for made in moves(client, "research-rl")] == ["it is better"], "an event that comes twice moves nothing"
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


def opened(space: Workspace, name: str) -> Tracker:
    """A run that writes its journal while nobody sends it."""
    tracker = Tracker(TrackingJournal(journals(space) / name), None, "")
    artifacts = str(space.root / "mlartifacts")
    tracker.journal.write("open", name=name, experiment="research-rl", uri="", artifacts=artifacts, tags={}, params={"seed": "42"})
    return tracker


_REFUSALS = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "ENDPOINT_NOT_FOUND"}
"""MLflow's names of refusals by HTTP status; its client goes by the name."""


@contextmanager
def refusing(status: int) -> Generator[str]:
    """A server that answers every request with one status and MLflow's form of an error; yields its address."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps({"error_code": _REFUSALS[status], "message": "not for you"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_journal_that_mlflow_refuses_to_open_is_kept_and_sent_once_it_lets_us_in(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    tracker = opened(space, "1-run")
    tracker.journal.write("close", status="FINISHED")
    with refusing(status) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert sender.send_all(journals(space), live=None) == 1
    place = Place.load(tracker.journal.folder)
    assert not place.done and place.offset == 0 and f"HTTP {status}" in place.failure
    assert "MLflow refused to open the run" in caplog.text
    tracker._report(place)
    assert f"took not all events (MLflow refused to open the run: HTTP {status}" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{space.root}/mlflow.db")
    assert sender.send_all(journals(space), live=None) == 0
    assert Place.load(tracker.journal.folder).done


@contextmanager
def failing(target: str, faults: list[tuple[str, int]]) -> Generator[tuple[str, list[str]]]:
    """A way to a server that answers a request by each of `faults`, which are the end of a path and a status, and passes the others on.

    Yields its address and the paths that were asked for.
    """
    asked: list[str] = []

    class Forwarding(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault := next((fault for fault in faults if self.command != "GET" and self.path.endswith(fault[0])), None):
                faults.remove(fault)
                code = "INVALID_PARAMETER_VALUE" if fault[1] == 400 else "INTERNAL_ERROR"
                status, content, kind = fault[1], json.dumps({"error_code": code, "message": "no"}).encode(), "application/json"
            else:
                kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection", "content-length")}
                reply = httpx.request(self.command, target + self.path, content=body, headers=kept, timeout=PATIENCE_S, trust_env=False)
                status, content, kind = reply.status_code, reply.content, reply.headers.get("Content-Type", "")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    way = ThreadingHTTPServer(("127.0.0.1", 0), Forwarding)
    threading.Thread(target=way.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{way.server_port}", asked
    finally:
        way.shutdown()
        way.server_close()


def test_a_trace_that_did_not_arrive_is_sent_again_and_stands_once(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Any]
) -> None:
    """MLflow's client raises nothing for a trace that it could not send: it was lost with a line in the log."""
    from mlflow import MlflowClient

    url, running = server
    for name, value in (sender.CLIENT | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}).items():
        monkeypatch.setenv(name, value)
    questions = [f"Who was {number}?" for number in range(8)]
    tracker, other = opened(space, "1-run"), opened(space, "2-run")
    for each in (tracker, other):
        for question in questions:
            each.journal.write("trace", key="flow", record={**EPISODE, "question": question})
        each.journal.write("close", status="FINISHED")
    faults: list[tuple[str, int]] = []

    def in_mlflow(where: str | None = None) -> list[str]:
        """Return the questions of the traces that fit `where`, all of which are whole."""
        found = MlflowClient().search_traces(locations=[Place.load(tracker.journal.folder).experiment], filter_string=where)
        assert [len(trace.data.spans) for trace in found] == [6] * len(found)
        return sorted(json.loads(trace.data.request or "")["question"] for trace in found)

    with running(), failing(url, faults) as (way, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way)
        for part in ("/v1/traces", "/mlflow/traces"):
            faults.append((part, 500))
            assert not sender._Sender(tracker.journal.folder, 0.0, live=False).run()
            assert not faults and part in Place.load(tracker.journal.folder).failure
        assert sender._Sender(tracker.journal.folder, 0.0, live=False).run()
        requests = {part: sum(path.endswith(part) for path in asked) for part in ("traces/search", "/v1/traces", "/mlflow/traces")}
        assert requests == {"traces/search": 0, "/v1/traces": 3, "/mlflow/traces": 3 * 8}, "none is looked for, and all spans go together"
        assert in_mlflow() == questions, "no half trace stands either"
        # One that MLflow refuses takes no other with it.
        faults += [("/mlflow/traces", 400)] * (len(questions) + 1)
        assert sender._Sender(other.journal.folder, 0.0, live=False).run()
        place = Place.load(other.journal.folder)
        assert (place.refused, in_mlflow(f"attributes.run_id = '{place.runs['flow']}'")) == (1, questions[1:])


def test_a_deleted_experiment_is_restored_and_one_that_is_gone_is_made_anew(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{space.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    tracker = opened(space, "1-run")
    journal = sender._Sender(tracker.journal.folder, 0.0, live=True)
    journal._send(read(tracker.journal.folder, 0))
    experiment = journal.place.experiment
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"

    client.delete_experiment(experiment)
    tracker.metrics({"f1_after": 0.9})
    with pytest.raises(sender.Unreachable, match="restored"):
        journal._send(read(tracker.journal.folder, journal.place.offset))
    journal._send(read(tracker.journal.folder, journal.place.offset))
    assert client.get_run(journal.place.runs["flow"]).data.metrics == {"f1_after": 0.9}

    client.delete_experiment(experiment)
    second = opened(space, "2-run")
    second.journal.write("close", status="FINISHED")
    assert sender._Sender(second.journal.folder, 0.0, live=False).run()
    assert client.get_experiment(experiment).lifecycle_stage == "active"

    with sqlite3.connect(space.root / "mlflow.db") as database:
        for table in ("runs", "experiments"):
            database.execute(f"delete from {table} where experiment_id = ?", (experiment,))
    tracker.journal.write("close", status="FINISHED")
    assert sender._Sender(tracker.journal.folder, 30.0, live=False).run()
    place = Place.load(tracker.journal.folder)
    assert place.done and place.runs and client.get_run(place.runs["flow"]).data.metrics == {"f1_after": 0.9}


def test_a_journal_damaged_by_a_full_disk_stops_no_other(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{space.root}/mlflow.db")
    damaged, whole = opened(space, "1-run"), opened(space, "2-run")
    with (damaged.journal.folder / EVENTS).open("ab") as stream:
        stream.write(b'{"op": "metrics", "ti{"op": "metrics", "time": 1}\n')
    for tracker in (damaged, whole):
        tracker.journal.write("close", status="FINISHED")
    assert sender.send_all(journals(space), live=None) == 0
    assert [Place.load(tracker.journal.folder).done for tracker in (damaged, whole)] == [True, True]


@pytest.mark.parametrize("name", ["a%20b", "what?", "é [x] #1 & ;=", "100%"])
def test_the_database_lies_in_the_workspace_whatever_its_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    space = Workspace(tmp_path / name)
    space.root.mkdir()
    lay_mlflow(space.root / "mlflow.db")
    tracker = opened(space, "1-run")
    (space.root / "file.txt").write_text("x")
    tracker.journal.write("artifact", key="flow", path=str(space.root / "file.txt"), folder="")
    tracker.journal.write("close", status="FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(config.load_profile("laptop"), space))
    assert sender.send_all(journals(space), live=None) == 0
    place = Place.load(tracker.journal.folder)
    assert (place.done, place.refused) == (True, 0)
    with sqlite3.connect(space.root / "mlflow.db") as stored:
        assert stored.execute("select count(*) from runs").fetchone() == (1,)
    assert list(space.root.glob("mlartifacts/*/artifacts/file.txt"))
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing may come into being beside the workspace"


def test_the_parent_run_carries_what_the_run_is_judged_by(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{space.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    change = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 96}
    facts = {"before": {"f1": 0.25, "em": 0.25}, "after": {"f1": 0.75, "em": 0.75}, "difference": {"f1": change, "em": change}}
    tracker = opened(space, "1-run")
    tracker.metrics(_headline(facts))
    tracker.tags("flow", {"verdict": _verdict(facts)})
    tracker.journal.write("close", status="FINISHED")
    assert sender.send_all(journals(space), live=None) == 0
    parent = MlflowClient(tracking_uri=uri).get_run(Place.load(tracker.journal.folder).runs["flow"])
    assert {
        "f1_before": 0.25,
        "f1_after": 0.75,
        "f1_difference": 0.5,
        "f1_difference_low": 0.4,
        "f1_difference_high": 0.6,
        "questions": 96.0,
    }.items() <= parent.data.metrics.items()
    assert parent.data.tags["verdict"] == "better"
    assert _verdict({"difference": {"f1": {"low": -0.1, "high": 0.2, "n": 64}}}).startswith("undecided")
    assert _verdict({"difference": {"f1": {"low": 0.1, "high": 0.2, "n": FEWEST - 1}}}) == "undecided: 9 questions, it takes 10"
