"""In a flow the gate alone moves the champion, says why everywhere, asks a person where it should, and waits for nobody."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Generator
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.serving.model import served_name
from tasks.evaluation.gate import Held, ask_standing, conclude, gate
from tasks.job import Job
from tasks.tracking import announce, champion, registry, track
from tasks.tracking.track import Tracker
from tests.databases import lay_mlflow
from tests.prefect_server import harness
from tests.unit.test_gate_run import Ring, ring, tokenizer
from tests.waiting import PATIENCE_S, until

__all__ = ["ring", "tokenizer"]

MODEL = "research-rl"
FACTS: dict[str, Any] = {
    "before": {"f1": 0.1, "em": 0.1},
    "after": {"f1": 0.9, "em": 0.9},
    "difference": {name: {"mean": 0.8, "low": 0.7, "high": 0.9, "n": 120} for name in ("f1", "em")},
}


@pytest.fixture(scope="module", autouse=True)
def server() -> Generator[None]:
    with harness():
        yield


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the sender's answers, not for a time: on a busy machine its first import of MLflow takes minutes."""
    monkeypatch.setattr("tasks.evaluation.gate.WAIT_S", PATIENCE_S)
    monkeypatch.setattr(track, "_DRAIN_S", PATIENCE_S)


def become(ring: Ring, stage: str, name: str) -> str:
    """Make a policy the artifact of a stage; return the hash of its manifest."""
    folder = ring.workspace.folder(stage)
    with manifest.publish(folder, stage, name, {}) as staging:
        shutil.copytree(ring.workspace.root / name, staging.path, dirs_exist_ok=True)
    skill = ring.services.skill[ring.names[name]]
    ring.services.skill[served_name(folder)] = skill
    ring.services.asked_of.setdefault(served_name(folder), type(ring.services.asked_of[ring.names[name]])())
    return manifest.load(folder).hash


@pytest.fixture
def trained(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> Ring:
    """A workspace whose training made a good policy out of a bad one; nothing is registered yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{ring.workspace.root}/mlflow.db")
    lay_mlflow(ring.workspace.root / "mlflow.db")
    become(ring, "policy", "bad")
    with manifest.publish(ring.workspace.folder("report"), "report", "x", {}) as staging:
        staging.facts |= FACTS
    return ring


def run(ring: Ring, config: Config) -> list[Held]:
    """Register the trained policy and hold the gate, as research-train does; return what was decided."""
    configuration.save(config, ring.workspace.root / "params.yaml")

    @flow(name="research-train")
    def training() -> list[Held]:
        tracker = Tracker.start(config, Workspace(ring.workspace.root), flow="research-train", run_id="0123456789")
        job = Job(config, ring.workspace, tracker)
        ask_standing(job)
        export = ring.workspace.folder("export")
        with tracker.stage("export", config, ()) as of_export:
            of_export.register(export, MODEL, {"manifest": manifest.load(export).hash})
        decided = gate(job)
        conclude(job, decided)
        assert tracker.close("FINISHED")
        return decided.result()

    return training()


def client(ring: Ring) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{ring.workspace.root}/mlflow.db")


def test_the_first_champion_beats_its_own_start_and_a_worse_challenger_changes_nothing(trained: Ring) -> None:
    first = become(trained, "export", "good")
    (held,) = run(trained, trained.config())
    assert held.met is None and held.decision.outcome == "promote"
    version = registry.champion(client(trained), MODEL)
    assert version.tags["manifest"] == first and version.tags["gate.outcome"] == "promote" and version.tags["gate.promoted"] == "true"
    assert held.decision.reason in version.description and "F1 0.100 before training" in version.description
    (moved,) = registry.moves(client(trained), MODEL)
    assert moved.reason.by == registry.GATE and held.decision.reason in moved.reason.why
    with get_client(sync_client=True) as prefect:
        shown = [item for item in prefect.read_artifacts() if item.key == "gate-decision"]
    assert held.decision.reason in str(shown[-1].data)

    assert run(trained, trained.config()) == [], "the champion does not meet itself"
    asked = trained.services.total(served_name(trained.workspace.folder("export")))
    second = become(trained, "export", "fair")
    (held,) = run(trained, trained.config())
    assert held.met == "1" and held.decision.outcome == "refuse"
    assert registry.champion(client(trained), MODEL).tags["manifest"] == first
    refused = registry.version_of(client(trained), MODEL, second)
    assert refused.tags["gate.met"] == "1" and refused.tags["gate.outcome"] == "refuse"
    assert len(registry.moves(client(trained), MODEL)) == 1 and asked > 0


def test_a_move_by_hand_is_recorded_like_a_gates(trained: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    hash, root = become(trained, "export", "good"), trained.workspace.root
    configuration.save(trained.config(), root / "params.yaml")
    client(trained).create_registered_model(MODEL)
    client(trained).create_model_version(MODEL, str(trained.workspace.folder("export")), tags={"manifest": hash})
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    assert champion.main(["--workspace", str(root), "promote", "--to", "1", "--why", "asked | for"]) == 0
    version = registry.champion(client(trained), MODEL)
    assert version.tags["champion.why"] == "asked | for" and version.tags["champion.by"] == registry.BY_HAND
    with get_client(sync_client=True) as prefect:
        (shown,) = [item for item in prefect.read_artifacts() if item.key == announce.ARTIFACT]
        assert "version 1" in str(shown.data) and "asked" in str(shown.data) and champion.whoami() in str(shown.data)

        def events() -> list[dict[str, Any]]:
            asked = {"filter": {"event": {"name": [announce.EVENT]}}}
            return prefect.request("POST", "/events/filter", json=asked).json()["events"]  # type: ignore[arg-type]

        until(lambda: bool(events()))
        (event,) = events()
    assert event["resource"]["prefect.resource.id"] == f"research.model.{MODEL}"
    assert event["payload"]["after"] == "1" and event["payload"]["why"] == "asked | for"


def resume(answer: dict[str, Any], done: threading.Event) -> None:
    """Resume the flow run that waits for approval with an answer, as a person does in Prefect's page."""
    with get_client(sync_client=True) as prefect:

        def paused() -> FlowRun | None:
            return next((item for item in prefect.read_flow_runs() if item.state and item.state.is_paused()), None)

        until(lambda: paused() is not None)
        found = paused()
        assert found
        resume_flow_run(found.id, run_input=answer)
    done.set()


def test_a_person_may_refuse_and_the_refusal_is_recorded(trained: Ring) -> None:
    become(trained, "export", "good")
    done = threading.Event()
    threading.Thread(target=resume, args=({"approve": False, "who": "Ann", "why": "too costly"}, done), daemon=True).start()
    (held,) = run(trained, trained.config(approval=True))
    assert done.is_set() and held.decision.outcome == "promote"
    assert registry.champion(client(trained), MODEL) is None
    version = registry.version_of(client(trained), MODEL, held.challenger)
    assert version.tags["gate.promoted"] == "false"
    assert "The promotion was refused by Ann: too costly." in version.tags["gate.reason"]


def test_where_mlflow_says_nothing_nothing_is_decided(trained: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    become(trained, "export", "good")
    monkeypatch.setattr("tasks.evaluation.gate.WAIT_S", 1.0)

    @flow
    def alone() -> Any:
        tracker = Tracker.start(trained.config(), trained.workspace, flow="research-train", run_id="0123456789")
        job = Job(trained.config(), trained.workspace, tracker)  # nobody asked, so nobody answers
        decided = gate(job)
        tracker.close("FINISHED")
        return decided.result()

    assert alone() == []
    assert not (trained.workspace.root / "artifacts" / "gates").exists()
    assert json.dumps(dict(trained.services.asked_of[trained.names["good"]])) == "{}"
