"""What decides an artifact makes it stale when it changes: also the contents of the user's own files, which no parameter shows."""

from __future__ import annotations

import os
from pathlib import Path

import faiss
import numpy as np
import pytest

from research_rl import config
from research_rl.config import Config
from research_rl.index.search import file_name
from research_rl.pipeline import manifest
from research_rl.pipeline.outside import differences
from research_rl.pipeline.run import current, run_stage
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.verified import Verified
from research_rl.pipeline.work import Work
from research_rl.planning.plan import state
from tests.contract import chain_model
from tests.knowledge import built, context
from tests.unit.test_verified import SIZE, later, read_bytes

ENCODER = {"dim": 64, "shard_rows": 100}
CORPUS = {"corpus": {"shard_rows": 100}}


def row(resolved: Config, space: Workspace, stage: str) -> tuple[str, str]:
    """The state of a stage as `research status` shows it, and why."""
    return next((line.state, line.detail) for line in state(resolved, space) if line.stage == stage)


def test_a_policy_is_stale_when_its_model_folder_changed(tmp_path: Path) -> None:
    """Other weights under the same path left the policy, and all that was trained from it, current."""
    model = chain_model.build(tmp_path / "model", {"tick": "tock", "tock": "tick"})
    overrides = ["policy.source=folder", "policy.path=model", "policy.warm_up=false"]  # relative to the workspace
    resolved, space = config.load_profile("laptop", overrides), Workspace(tmp_path)
    first, _ = run_stage("policy", resolved, space)
    (model / "config.json").touch()
    (model / "README.md").write_text("no part of the policy")
    assert run_stage("policy", resolved, space) == (first, False), "equal bytes, whatever the time, are the same model"
    other = chain_model.build(tmp_path / "other", {"tick": "tick", "tock": "tock"})
    (other / "model.safetensors").rename(model / "model.safetensors")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    expected = "policy.path: chat_template.jinja is new; policy.path: model.safetensors changed"
    assert row(resolved, space, "policy") == ("stale", expected)
    second, was_built = run_stage("policy", resolved, space)
    assert was_built and second.hash != first.hash
    assert row(resolved, space, "policy")[0] == "current"


def test_an_edit_in_place_of_the_users_model_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    """The policy held hard links to the user's files."""
    model = chain_model.build(tmp_path / "model", {"tick": "tock", "tock": "tick"})
    resolved = config.load_profile("laptop", ["policy.source=folder", f"policy.path={model}", "policy.warm_up=false"])
    space = Workspace(tmp_path / "workspace")
    run_stage("policy", resolved, space)
    with (model / "config.json").open("a") as edited:
        edited.write("\n\n")
    assert manifest.load(space.folder("policy"), verify=True).stage == "policy", "a file that changed is refused"
    assert not (space.folder("policy") / "config.json").read_text().endswith("\n\n")


@pytest.mark.parametrize("left", [[], ["README.md"]])
def test_a_policy_stays_current_where_its_source_is_not(tmp_path: Path, left: list[str]) -> None:
    """`dvc pull` brings the artifact to machines that never had the model folder; an unmounted disk leaves an empty one."""
    model = chain_model.build(tmp_path / "model", {"tick": "tock", "tock": "tick"})
    resolved = config.load_profile("laptop", ["policy.source=folder", f"policy.path={model}", "policy.warm_up=false"])
    space = Workspace(tmp_path / "workspace")
    run_stage("policy", resolved, space)
    model.rename(tmp_path / "away")
    for name in left:
        model.mkdir()
        (model / name).write_text("mount here")
    assert row(resolved, space, "policy")[0] == "current"


def test_an_index_is_stale_when_the_file_it_was_copied_from_changed(tmp_path: Path) -> None:
    made = built(tmp_path / "made", encoder=ENCODER)
    vectors = np.concatenate([np.load(path) for path in sorted(made.folder("embed").glob("vectors-*.npy"))])
    path = tmp_path / "space" / "own.index"
    path.parent.mkdir()
    for index in (faiss.IndexFlatIP(64), faiss.IndexFlatL2(64)):
        index.add(vectors)
        faiss.write_index(index, str(path))
        if index.metric_type == faiss.METRIC_INNER_PRODUCT:
            tree = {"encoder": {**ENCODER, "vectors": False}, "index": {"prebuilt": "own.index"}, **CORPUS}  # relative to the workspace
            resolved, space = Config.model_validate(tree), built(path.parent, **tree)
            assert current("index", resolved, space)
    assert current("index", resolved, space) is None
    second, was_built = run_stage("index", resolved, space)
    assert was_built and (space.folder("index") / file_name(0)).read_bytes() == path.read_bytes()
    path.unlink()
    assert current("index", resolved, space) == second, "the artifact is used where its source is not"


def test_unfinished_work_of_another_content_is_not_taken_up(tmp_path: Path) -> None:
    built(tmp_path, encoder=ENCODER)
    given = context("index", tmp_path, index={"prebuilt": "own.index"})
    first = Work(given, {"own.index": "0" * 64}).folder
    assert Work(given, {"own.index": "0" * 64}).folder == first
    assert Work(given, {"own.index": "1" * 64}).folder != first and not first.exists()


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path, verified = tmp_path / "weights", Verified(tmp_path / "verified.sqlite", clock=later)
    path.write_bytes(os.urandom(SIZE))
    recorded = {"weights": manifest.file_sha256(path)}
    counts = list[int]()
    for _ in range(2):
        before = read_bytes()
        assert differences("policy.path", recorded, {"weights": path}, verified) == []
        counts.append(read_bytes() - before)
    assert counts[0] >= SIZE > 4 * counts[1]
    assert differences("policy.path", {**recorded, "x": ""}, {"weights": path}, verified) == ["policy.path: x is gone"]
