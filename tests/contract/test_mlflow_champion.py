"""Who is champion, who made it so and why: moved by a gate or by hand, and taken back, in a real MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from research_rl import config
from research_rl.errors import ConfigError
from research_rl.evaluation import cells
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.registry import Registry
from tasks.tracking import registry, track
from tasks.tracking.champion import Desk, main
from tasks.tracking.registry import BY_HAND, GATE, ROLLBACK, Move, Reason, before
from tasks.tracking.track import Tracker
from tests.contract.test_mlflow_tracking import server, space
from tests.waiting import PATIENCE_S

__all__ = ["server", "space"]

MODEL = "research-rl"


def policy(folder: Path, name: str) -> str:
    """Publish a model folder and return its manifest's hash."""
    with manifest.publish(folder, "export", name, {}) as staging:
        (staging.path / "config.json").write_text(json.dumps({"name": name}))
    return manifest.load(folder).hash


def trained(space: Workspace, client: MlflowClient, *names: str) -> list[str]:
    """Register a policy for each name, as the sender does for research-train, and return their artifacts' hashes."""
    experiment = client.create_experiment("research-rl", artifact_location=None if "http" in client.tracking_uri else space.root.as_uri())
    hashes: list[str] = []
    for name in names:
        hashes.append(policy(space.root / name, name))
        run = client.create_run(experiment).info.run_id
        registry.register(client, run, MODEL, space.root / name, {"manifest": hashes[-1]})
    return hashes


@pytest.fixture
def desk(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A registry with three versions and no champion."""
    import mlflow

    uri = f"sqlite:///{space.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    trained(space, client, "one", "two", "three")
    return Desk(client, space, MODEL)


def test_each_move_is_recorded_and_rollbacks_go_back_step_by_step(desk: Desk) -> None:
    for number in ("1", "2", "3"):
        desk.promote(number, f"reason {number}")
    assert desk.show()["champion"] == "3"
    assert desk.rollback("it is slow")["to"] == "2"
    assert desk.rollback("")["to"] == "1", "a second rollback goes back further, and not forth"
    with pytest.raises(ConfigError, match=r"no version of research-rl was champion before version 1"):
        desk.rollback("")
    made = registry.moves(desk.client, MODEL)
    assert [(move.before, move.after, move.reason.by) for move in made] == [
        ("", "1", BY_HAND),
        ("1", "2", BY_HAND),
        ("2", "3", BY_HAND),
        ("3", "2", ROLLBACK),
        ("2", "1", ROLLBACK),
    ]
    assert made[3].reason.why == "it is slow" and "@" in made[3].reason.who and made[3].reason.when.startswith("20")
    tags = desk.client.get_model_version(MODEL, "2").tags
    assert (tags["champion.by"], tags["champion.why"], tags["champion.before"]) == (ROLLBACK, "it is slow", "3"), "of its last move"
    assert tags["champion.who"] == made[3].reason.who and tags["champion.when"] == made[3].reason.when
    assert desk.promote("3", "asked for")["from"] == "1"
    assert desk.rollback("")["to"] == "1"


def test_a_move_by_hand_stands_where_prefect_does_not_answer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert desk.promote("1", "first")["to"] == "1" and desk.show()["champion"] == "1"
    assert "Prefect at http://127.0.0.1:9/api was not told that the champion moved" in capsys.readouterr().err


def test_a_gate_moves_nothing_once_another_is_champion(desk: Desk) -> None:
    hashes = [
        version.tags["manifest"] for version in sorted(desk.client.search_model_versions(f"name = '{MODEL}'"), key=lambda v: int(v.version))
    ]
    registry.promote(desk.client, MODEL, hashes[0], None, Reason.now(GATE, "run a", "better than the untrained policy"))
    registry.promote(desk.client, MODEL, hashes[1], None, Reason.now(GATE, "run b", "better than the untrained policy"))
    assert desk.show()["champion"] == "1", "version 2 never met version 1"
    assert "gate met version None" in desk.client.get_model_version(MODEL, "2").tags["gate.overtaken"]
    registry.promote(desk.client, MODEL, hashes[1], "1", Reason.now(GATE, "run b", "better than version 1"))
    assert desk.show()["champion"] == "2"


def test_what_is_not_there_is_refused_with_what_is(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="has no version 9; its versions are 1, 2, 3"):
        desk.promote("9", "-")
    with pytest.raises(ConfigError, match="has no champion, so there is nothing to roll back"):
        desk.rollback("")
    with pytest.raises(ConfigError, match=r"has no alias 'champion'; its aliases are candidate \(version 3\)"):
        desk.aliased("champion")
    desk.promote("1", "-")
    with pytest.raises(ConfigError, match="is the champion already"):
        desk.promote("1", "-")
    root = ["--workspace", str(desk.workspace.root)]
    assert main([*root, "fetch", f"{MODEL}@nobody"]) == 1
    assert capsys.readouterr().err.strip().endswith("its aliases are candidate (version 3), champion (version 1)")
    assert main([*root, "fetch", MODEL]) == 1
    assert "names no version" in capsys.readouterr().err


def test_a_version_is_fetched_once_and_a_torn_one_is_fetched_again(desk: Desk) -> None:
    folder = Path(desk.fetch("2")["folder"])
    assert json.loads((folder / "config.json").read_text()) == {"name": "two"}
    assert manifest.load(folder).hash == desk.client.get_model_version(MODEL, "2").tags["manifest"]
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert Path(desk.fetch("2")["folder"]) == folder and (folder / "config.json").stat().st_mtime_ns == stamp
    (folder / "manifest.json").unlink()
    assert manifest.load(Path(desk.fetch("2")["folder"])).stage == "export"


def test_a_model_of_the_workspace_is_not_downloaded(desk: Desk) -> None:
    policy(desk.workspace.folder("export"), "three")
    assert desk.fetch("3")["folder"] == str(desk.workspace.folder("export"))


def test_the_command_names_a_registered_model_as_its_artifact_does(desk: Desk) -> None:
    desk.promote("2", "-")
    asked = Registry(desk.workspace.root)
    assert asked.champion(MODEL) == f"registry:{MODEL}/2"
    assert asked.fetch(f"{MODEL}@champion").version == "2"
    model = cells.model(f"registry:{MODEL}@champion", config.load_profile("laptop"), desk.workspace, asked.folder)
    assert model.sha256 == desk.client.get_model_version(MODEL, "2").tags["manifest"]
    with pytest.raises(ConfigError, match=r"no alias 'best'; its aliases are candidate \(version 3\), champion \(version 2\)"):
        asked.folder(f"{MODEL}@best")


def test_a_run_learns_who_is_champion_while_it_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "_DRAIN_S", PATIENCE_S)
    desk.promote("2", "-")
    tracker = Tracker.start(config.load_profile("laptop"), desk.workspace, flow="research-train", run_id="0123456789")
    tracker.ask_standing(MODEL)
    found = tracker.standing(PATIENCE_S)
    assert tracker.close("FINISHED")
    assert found == {"version": "2", "manifest": desk.client.get_model_version(MODEL, "2").tags["manifest"]}


def test_an_alias_set_elsewhere_is_where_a_rollback_leads() -> None:
    def made(was: str, after: str, by: str = GATE) -> Move:
        return Move(was, after, Reason.now(by, "-", "-"))

    assert before([made("", "1"), made("4", "5")], "5") == "4", "version 4 was made champion in MLflow itself"
    assert before([made("", "1"), made("1", "2")], "7") == "2", "version 7 was made champion in MLflow itself"
    assert before([made("", "1"), made("1", "2"), made("2", "1", BY_HAND)], "1") == "2"
    assert before([], "1") is None


def test_a_server_is_asked_over_http(space: Workspace, server: tuple[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    url, running = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    with running():  # type: ignore[operator]
        (hash,) = trained(space, MlflowClient(tracking_uri=url), "one")
        asked = Registry(space.root)
        assert asked.champion(MODEL) is None
        assert asked.call("promote", to="1", why="-first of all")["to"] == "1"
        folder = asked.folder(f"{MODEL}@champion")
        assert manifest.load(folder).hash == hash and folder != space.root / "one"
