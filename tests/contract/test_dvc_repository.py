"""What a driver built, DVC takes as its own: nothing reruns, and one changed parameter reruns only what depends on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Workspace
from tasks.local.stack import Stack
from tasks.versioning import commit

SMALL = ("entities=60", "train_questions=64", "dev_questions=8", "test_questions=16")
BUILT = ("download", "validate", "prepare", "corpus", "embed", "index")
PIPELINE = BUILT[1:]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose data stages were built without DVC and then recorded."""
    space = Workspace(tmp_path_factory.mktemp("dvc"))
    resolved = config.load_profile("laptop", [f"data.generated.{item}" for item in SMALL])
    config.save(resolved, space.root / "params.yaml")
    for name in BUILT:
        run_stage(name, resolved, space)
    commit.record(space, BUILT)
    return space


def change(space: Workspace, *overrides: str) -> None:
    path = space.root / "params.yaml"
    config.save(config.load(path, overrides), path)


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_nothing_runs_after_a_record(workspace: Workspace) -> None:
    assert "up to date" in commit.dvc(workspace.root, "status", "data.dvc", *PIPELINE)
    assert ran(commit.dvc(workspace.root, "repro", *PIPELINE)) == []


def test_recorded_artifacts_are_still_whole_and_replaceable(workspace: Workspace) -> None:
    resolved = config.load(workspace.root / "params.yaml")
    before = manifest.load(workspace.folder("corpus"))
    assert run_stage("corpus", resolved, workspace) == (before, False)
    assert run_stage("corpus", resolved, workspace, force=True) == (before, True)


def test_one_parameter_reruns_only_what_depends_on_it(workspace: Workspace) -> None:
    hashes = {name: manifest.load(workspace.folder(name)).hash for name in BUILT}
    before = config.load(workspace.root / "params.yaml").encoder.dim
    change(workspace, "encoder.dim=64")
    assert ran(commit.dvc(workspace.root, "repro", *PIPELINE)) == ["embed", "index"]
    after = {name: manifest.load(workspace.folder(name)).hash for name in BUILT}
    assert {name for name in BUILT if hashes[name] != after[name]} == {"embed", "index"}
    change(workspace, f"encoder.dim={before}")
    assert ran(commit.dvc(workspace.root, "repro", *PIPELINE)) == [], "the run cache knows the earlier artifacts"
    assert {name: manifest.load(workspace.folder(name)).hash for name in BUILT} == hashes


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, str]]:
    """A real S3 server with an empty bucket; yields the variables that its clients need."""
    stack = Stack(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESEARCH_S3_PORT", "0")
        try:
            yield stack.s3()
        finally:
            stack.down()


def test_a_fresh_clone_pulls_the_same_bytes_from_s3(workspace: Workspace, bucket: dict[str, str], tmp_path: Path) -> None:
    commit.dvc(workspace.root, "remote", "add", "--default", "--force", "s3", "s3://research-rl/dvc")
    commit.dvc(workspace.root, "push", "data.dvc", *PIPELINE, env=bucket)
    clone = Workspace(tmp_path / "clone")
    clone.root.mkdir()
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc"):
        shutil.copy(workspace.root / name, clone.root / name)
    shutil.copytree(workspace.root / ".dvc", clone.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    commit.dvc(clone.root, "pull", "data.dvc", *PIPELINE, env=bucket)
    for name in BUILT:
        assert manifest.load(clone.folder(name)).hash == manifest.load(workspace.folder(name)).hash
    assert ran(commit.dvc(clone.root, "repro", *PIPELINE)) == []


def test_a_wrong_key_is_one_clear_error(workspace: Workspace, bucket: dict[str, str]) -> None:
    from research_rl.errors import ServiceError

    commit.dvc(workspace.root, "remote", "add", "--default", "--force", "s3", "s3://research-rl/elsewhere")
    with pytest.raises(ServiceError, match="push"):
        commit.dvc(workspace.root, "push", "data.dvc", env={**bucket, "AWS_SECRET_ACCESS_KEY": "wrong"})


def test_the_checkout_has_a_repository_with_a_remote() -> None:
    done = subprocess.run([*commit.COMMAND, "config", "--list"], cwd=CHECKOUT, env=os.environ, capture_output=True, text=True, check=True)
    assert "remote.s3.url=s3://research-rl/dvc" in done.stdout and "core.analytics=false" in done.stdout
