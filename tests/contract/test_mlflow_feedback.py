"""Verdicts of people on the agent's answers reach a real MLflow: once each, as feedback on a trace of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from research_rl.agent.feedback import Feedback, FeedbackRequest, Given, feedback_folder
from research_rl.pipeline.stages import Workspace
from tasks.tracking.feedback import main
from tests.contract.test_mlflow_tracking import space

__all__ = ["space"]

EPISODE: dict[str, Any] = {
    "stop": "answered",
    "prompt_tokens": 12,
    "segments": [{"author": "model", "text": "<think> hmm </think> <answer> \\boxed{Ada} </answer>", "tokens": 9}],
    "searches": [],
    "engine_seconds": 1.0,
}


def judge(feedback: Feedback, **said: Any) -> None:
    feedback.take(FeedbackRequest(response_id="resp_abc", **said))


def told(space: Workspace) -> list[tuple[str, dict[str, Any], list[Any]]]:
    """Return the traces: their question, the last verdict by name, and the verdicts in order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{space.root}/mlflow.db")
    found: list[tuple[str, dict[str, Any], list[Any]]] = []
    for trace in client.search_traces(locations=[each.experiment_id for each in client.search_experiments()]):
        assessments = sorted(trace.info.assessments, key=lambda each: each.create_time_ms)
        values = {each.name: (each.value, each.source.source_type) for each in assessments}
        verdicts = [(each.value, each.rationale) for each in assessments if each.name == "verdict"]
        found.append((json.loads(trace.data.request)["question"], values, verdicts))
    return found


def test_verdicts_make_one_trace(space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{space.root}/mlflow.db")
    feedback = Feedback(feedback_folder(space))
    feedback.remember("abc", Given("Who founded it?", "Ada", "policy-x", "registry:m/3", EPISODE))
    send = ["--workspace", str(space.root)]
    judge(feedback, verdict="up", comment="right")
    assert main(send) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == {"verdicts": 1}
    judge(feedback, verdict="down", answer="Ada King")
    # A call that was killed before it noted its place sends all of them again.
    (feedback.folder / "told.json").unlink()
    assert main(send) == 0
    assert main(send) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == {"verdicts": 0}
    [(question, values, verdicts)] = told(space)
    assert question == "Who founded it?" and verdicts == [(True, "right"), (False, None)]
    assert values["golden_answers"] == (["Ada King"], "HUMAN") and values["verdict"][1] == "HUMAN"


def test_a_silent_mlflow_is_told_and_gets_the_verdicts_later(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feedback = Feedback(feedback_folder(space))
    feedback.remember("abc", Given("Who founded it?", "Ada", "policy-x", "registry:m/3", EPISODE))
    judge(feedback, verdict="up")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["--workspace", str(space.root)]) == 3 and "MLflow takes no verdicts now" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{space.root}/mlflow.db")
    assert main(["--workspace", str(space.root)]) == 0
    assert [verdicts for _, _, verdicts in told(space)] == [[(True, None)]]


def test_a_workspace_without_verdicts_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workspace", str(tmp_path)]) == 0 and json.loads(capsys.readouterr().out) == {"verdicts": 0}
