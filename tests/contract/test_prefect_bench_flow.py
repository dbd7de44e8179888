"""The flow research-bench on a real Prefect server: cells that stand are shown, told to MLflow's journal once, and not played again.

So is the nightly flow of a workspace that was only set up: it ends at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.bench import research_bench
from flows.nightly import research_nightly
from research_rl import config
from research_rl.errors import ConfigError
from research_rl.evaluation import bench, cells
from research_rl.evaluation.cells import Cell, names
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.results import read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from tasks.evaluation.night import NOTHING_TO_MEASURE
from tasks.tracking import track
from tasks.tracking.journal import read
from tasks.tracking.track import journals
from tests.prefect_server import harness
from tests.unit.test_blame import Space, right


@pytest.fixture(scope="module", autouse=True)
def server() -> Generator[None]:
    with harness():
        yield


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """A workspace in which every cell of its benchmark stands: our protocol answers three of ten questions, closed book one."""
    space = Space(tmp_path / "work")
    space.config = config.load_profile("laptop", {"bench.models": ["before"], "bench.methods": ["research", "closed-book"]})
    config.save(space.config, space.workspace.root / "params.yaml")
    wanted, built = bench.matrix(space.config.bench, space.config, space.workspace), cells.parents(space.workspace, space.config)
    publish(space, cells.cells(space.config, space.workspace, built, wanted.models, wanted.methods, ["made"], 1), built)
    return space


def publish(space: Space, those: list[Cell], built: dict[str, Manifest]) -> None:
    for cell in those:
        with manifest.publish(cell.folder, cells.STAGE, cell.hash, built, cell.facts) as staging:
            results = right(0, 1, 2) if cell.method == "research" else right(0)
            write_evaluation(staging, space.config, results, {**cells.recorded(space.config), "cell": cell.facts})


def shown() -> tuple[str, str]:
    """Return the state of the last run and its page."""
    with get_client(sync_client=True) as client:
        run = max(client.read_flow_runs(), key=lambda run: run.created)  # type: ignore[arg-type, return-value]
        pages = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    return str(run.state_name), next((str(item.data) for item in pages if item.key == "bench"), "")


def begun(space: Space) -> list[list[str]]:
    """Return, for each run so far, the names of the runs inside it that MLflow is to make."""
    folders = sorted(path.parent for path in journals(space.workspace).glob("*/events.jsonl"))
    return [[str(event["name"]) for _, event in read(folder, 0) if event["op"] == "begin"] for folder in folders]


def events(space: Space) -> list[dict[str, Any]]:
    """Return what all runs so far told MLflow, in their order."""
    folders = sorted(path.parent for path in journals(space.workspace).glob("*/events.jsonl"))
    return [event for folder in folders for _, event in read(folder, 0)]


def rows(space: Space) -> list[int]:
    """Return how many rows stand behind each evaluation that MLflow is to take."""
    evaluations = [event["evaluation"] for event in events(space) if event["op"] == "evaluation"]
    return [len(read_results(Path(event["folder"]))) for event in evaluations]


def test_the_benchmark_is_shown_and_told_once(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    research_bench(workspace=str(space.workspace.root))
    state, page = shown()
    assert state == "Completed" and "what search adds, before" in page and "+0.200" in page
    research_bench(workspace=str(space.workspace.root), against="paper")
    assert "No cell has a value in arXiv 2503.19470" in shown()[1]
    first, second = begun(space)
    assert first == ["bench", "before: research on made", "before: closed-book on made"]
    assert rows(space) == [10, 10], "MLflow gets the rows of each cell, not its means alone"
    assert second == [], "MLflow knows these cells"
    assert not [path for path in space.workspace.services.glob("*.log") if "sender" not in path.name], "no server was started"


def test_samples_prompts_and_models_of_one_name_are_runs_of_their_own(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    same = space.workspace.root / "other" / "before"
    shutil.copytree(space.workspace.folder("policy"), same)
    (same / manifest.MANIFEST).unlink()
    (same / "more.json").write_text("{}")
    section = {
        "models": ["before", {"model": "before", "prompt": {"template": "instruct"}}, str(same)],
        "methods": ["research"],
        "samples": 2,
    }
    space.config = config.load_profile("laptop", {"bench": section, "evaluation.temperature": 1.0})
    config.save(space.config, space.workspace.root / "params.yaml")
    wanted, built = bench.matrix(space.config.bench, space.config, space.workspace), cells.parents(space.workspace, space.config)
    those = cells.cells(space.config, space.workspace, built, wanted.models, ["research"], ["made"], 2)
    publish(space, those, built)
    research_bench(workspace=str(space.workspace.root))
    titles = [f"{name}: research on made{again}" for name in names(wanted.models).values() for again in ("", ", sample 2")]
    assert begun(space) == [["bench", *titles]] and len(set(titles)) == 6
    keys = [str(event["key"]) for event in events(space) if event["op"] == "begin"]
    assert keys == ["bench", *(f"bench/{cell.hash}" for cell in those)], "one run of MLflow a cell"


def test_cells_of_other_number_formats_engines_and_limits_are_other_logged_models(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    seen: list[dict[str, str]] = []
    for dtype, limits in (("float32", False), ("bfloat16", False), ("float32", True)):
        section = {"models": ["before"], "methods": ["research"]}
        space.config = config.load_profile("laptop", {"bench": section, "serving.dtype": dtype, "evaluation.published_limits": limits})
        config.save(space.config, space.workspace.root / "params.yaml")
        wanted, built = bench.matrix(space.config.bench, space.config, space.workspace), cells.parents(space.workspace, space.config)
        publish(space, cells.cells(space.config, space.workspace, built, wanted.models, ["research"], ["made"], 1), built)
        research_bench(workspace=str(space.workspace.root))
        seen.append([event for event in events(space) if event["op"] == "evaluation"][-1]["evaluation"]["model"]["params"])
    assert [(each["serving.dtype"], each["published_limits"]) for each in seen] == [
        ("float32", "False"),
        ("bfloat16", "False"),
        ("float32", "True"),
    ]
    assert {each["serving.engine"] for each in seen} == {space.config.serving.engine}


def test_an_unknown_publication_fails_the_run_at_once(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", 0.1)
    with pytest.raises(ConfigError, match="--against rumour is not known"):
        research_bench(workspace=str(space.workspace.root), against="rumour")
    assert shown() == ("Failed", "")


def test_a_night_where_nothing_was_trained_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "fresh"
    root.mkdir()
    for own in (False, True):
        if own:
            config.save(config.load_profile("laptop"), root / "params.yaml")
        caplog.clear()
        assert research_nightly(workspace=str(root)) == []
        assert shown() == ("Skipped", "")
        assert [record.getMessage() for record in caplog.records if record.name == "prefect.flow_runs"].count(NOTHING_TO_MEASURE) == 1
    assert [path.name for path in root.iterdir()] == ["params.yaml"], "no database, no run of MLflow, no lock"
