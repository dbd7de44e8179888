"""An evaluation is found by its folder, its cell's label, first digits, what stood before, or a name that MLflow knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_rl.config import Config
from research_rl.errors import ConfigError
from research_rl.evaluation.cells import Model
from research_rl.evaluation.named import folder
from research_rl.evaluation.results import RECORD
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from tasks.tracking.lookup import hashes
from tests.results import played, standing


def nobody(name: str) -> list[str]:
    raise AssertionError(f"MLflow was asked for {name}")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def evaluate(workspace: Workspace, text: str, **parents: Manifest) -> Manifest:
    """Publish an evaluation as its stage does."""
    context = Context(STAGES["evaluate"], Config(), workspace, parents, silent)
    with context.publish(keep=True) as staging:
        (staging.path / "results.jsonl").write_text(text)
    return manifest.load(workspace.folder("evaluate"))


def test_what_stood_before_is_kept_once(workspace: Workspace) -> None:
    assert folder("@current", workspace, nobody) == workspace.folder("evaluate")
    first = evaluate(workspace, "first")
    with pytest.raises(ConfigError, match="@previous: no evaluation was replaced"):
        folder("@previous", workspace, nobody)
    second = evaluate(workspace, "second")
    assert manifest.load(folder("@previous", workspace, nobody)) == first
    evaluate(workspace, "third")
    assert manifest.load(folder("@previous", workspace, nobody)) == second
    assert [path.name for path in (workspace.root / "artifacts" / "previous").iterdir()] == ["evaluation"]


def test_an_evaluation_that_another_version_graded_is_evaluated_again(workspace: Workspace) -> None:
    parents: dict[str, Manifest] = {}
    for name in STAGES["evaluate"].parents:
        with manifest.publish(workspace.folder(name), name, "x", {}):
            pass
        parents[name] = manifest.load(workspace.folder(name))

    def graded(record: str) -> Manifest | None:
        with Context(STAGES["evaluate"], Config(), workspace, parents, silent).publish() as staging:
            staging.facts["record"] = record
        return current("evaluate", Config(), workspace)

    assert graded(RECORD) and graded("by another version") is None


def test_a_publication_that_fails_replaces_and_keeps_nothing(workspace: Workspace) -> None:
    first = evaluate(workspace, "first")
    context = Context(STAGES["evaluate"], Config(), workspace, {}, silent)
    with pytest.raises(KeyboardInterrupt), context.publish(keep=True):
        raise KeyboardInterrupt
    assert manifest.load(workspace.folder("evaluate")) == first and not workspace.previous("evaluate").exists()


def test_a_cell_is_found_by_label_and_by_digits(workspace: Workspace) -> None:
    models = [Model(name, workspace.root, letter * 64) for name, letter in (("one", "a"), ("two", "b"))]
    cells = [standing(workspace.root, each, "research", [played(0, "Ada")]).cell for each in models]
    for cell in cells:
        for name in (cell.label, cell.hash[:12], cell.hash, manifest.load(cell.folder).hash[:12], str(cell.folder)):
            assert folder(name, workspace, nobody) == cell.folder
    with pytest.raises(ConfigError, match="0123 is neither a folder nor the label or the first 4 or more digits"):
        folder("0123", workspace, nobody)
    with pytest.raises(ConfigError, match="is neither a folder"):
        folder(cells[0].hash[:3], workspace, nobody)


def test_digits_that_several_begin_with_are_refused(workspace: Workspace) -> None:
    found = standing(workspace.root, Model("one", workspace.root, "a" * 64), "research", [played(0, "Ada")]).cell
    copy = found.folder.with_name("copy")
    copy.symlink_to(found.folder)
    with pytest.raises(ConfigError, match=r"begins the hashes of 2 evaluations: .*give more digits"):
        folder(found.hash[:12], workspace, nobody)


def test_a_name_of_mlflow_leads_to_the_evaluation_or_to_that_of_its_model(workspace: Workspace) -> None:
    with manifest.publish(workspace.folder("export"), "export", "x", {}):
        pass
    model = manifest.load(workspace.folder("export"))
    evaluation = evaluate(workspace, "one", export=model)
    cell = standing(workspace.root, Model("own", workspace.root, "d" * 64), "research", [played(0, "Ada")]).cell
    assert folder("mlflow:1", workspace, lambda _: ["0" * 64, evaluation.hash]) == workspace.folder("evaluate")
    assert folder("registry:policy/2", workspace, lambda _: [model.hash]) == workspace.folder("evaluate")
    assert folder("registry:policy@champion", workspace, lambda _: ["d" * 64]) == cell.folder
    with pytest.raises(ConfigError, match=r"mlflow:1 stands for artifacts eeeeeeeeeeee, and .* holds no evaluation of them"):
        folder("mlflow:1", workspace, lambda _: ["e" * 64])


def test_a_model_with_several_cells_is_its_plain_one_or_a_choice(workspace: Workspace) -> None:
    model = Model("own", workspace.root, "d" * 64)

    def cell(method: str, sample: int = 0, source: str = "made") -> Path:
        return standing(workspace.root, model, method, [played(0, "Ada", source=source)], sample=sample).cell.folder

    closed, again = cell("closed-book"), cell("research", 1)
    with pytest.raises(
        ConfigError,
        match=rf"registry:p/1 is a model with 2 evaluations in .*: artifacts/cells/{closed.name}, artifacts/cells/{again.name}; name",
    ):
        folder("registry:p/1", workspace, lambda _: ["d" * 64])
    plain = cell("research")
    assert folder("registry:p/1", workspace, lambda _: ["d" * 64]) == plain, "not the first by its label, which is that of closed book"
    other = cell("research", source="more")
    with pytest.raises(ConfigError) as refused:
        folder("mlflow:1", workspace, lambda _: ["d" * 64])
    assert plain.name in str(refused.value) and other.name in str(refused.value) and closed.name not in str(refused.value)
    assert folder(other.name, workspace, nobody) == other, "what the message names is what a command takes"


def test_mlflow_names_the_artifacts_of_runs_and_versions(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("made", artifact_location=str(tmp_path / "artifacts"))
    flow = client.create_run(experiment, tags={"manifest.baseline": "b", "manifest.evaluate": "e", "manifest.export": "x"}).info.run_id
    stage = client.create_run(experiment, tags={"manifest": "s"}).info.run_id
    bare = client.create_run(experiment).info.run_id
    client.create_registered_model("policy")
    client.create_model_version("policy", str(tmp_path), run_id=stage, tags={"manifest": "x"})
    client.set_registered_model_alias("policy", "champion", "1")
    assert hashes(client, f"mlflow:{flow}") == ["e", "b", "x"] and hashes(client, f"mlflow:{stage}") == ["s"]
    assert hashes(client, "registry:policy/1") == ["x"] == hashes(client, "registry:policy@champion")
    with pytest.raises(ConfigError, match="names no artifact of this pipeline"):
        hashes(client, f"mlflow:{bare}")
    with pytest.raises(ConfigError, match="registry:policy names no version"):
        hashes(client, "registry:policy")
