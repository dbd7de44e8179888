"""What a driver built, DVC takes as its own: nothing reruns, and one changed parameter reruns only what depends on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml

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
    commit.record(space, BUILT, resolved)
    return space


def change(space: Workspace, *overrides: str) -> None:
    path = space.root / "params.yaml"
    config.save(config.load(path, overrides), path)


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def git(root: Path, *arguments: str) -> None:
    """Run one command of git as a user of its own, so that it needs no settings of this machine."""
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *author, *arguments], cwd=root, check=True, capture_output=True)


def headline(space: Workspace, after: float) -> None:
    """Write what `dvc metrics` reads of a report."""
    folder = space.folder("report")
    folder.mkdir(parents=True, exist_ok=True)
    # DVC may have made the file a link into its cache.
    (folder / "headline.json").unlink(missing_ok=True)
    (folder / "headline.json").write_text(json.dumps({"steps": 2, "f1": {"before": 0.25, "after": after}}))


def test_nothing_runs_after_a_record(workspace: Workspace) -> None:
    assert "up to date" in commit.dvc(workspace.root, "status", "data.dvc", *PIPELINE)
    assert ran(commit.dvc(workspace.root, "repro", *PIPELINE)) == []


def test_parameters_edited_while_a_run_was_at_work_are_not_taken_for_what_built_the_artifacts(workspace: Workspace) -> None:
    path = workspace.root / "params.yaml"
    before, used = path.read_text(), config.load(path)
    edited = "# mine\n" + config.dump(config.load(path, ["encoder.dim=96"]))
    path.write_text(edited)
    try:
        commit.record(workspace, BUILT, used)
        assert path.read_text() == edited, "the user's file stands again, comments and all"
        status = commit.dvc(workspace.root, "status", "embed")
        assert "encoder" in status and "up to date" not in status
        assert (
            yaml.safe_load((workspace.root / "dvc.lock").read_text())["stages"]["embed"]["params"]["params.yaml"]["encoder"]["dim"]
            == used.encoder.dim
        )
    finally:
        path.write_text(before)
    assert "up to date" in commit.dvc(workspace.root, "status", "embed")


def test_a_commit_killed_with_the_edited_file_aside_loses_no_edit(tmp_path: Path) -> None:
    path, used = tmp_path / "params.yaml", config.load_profile("laptop")
    for newer in (False, True):
        path.write_text(config.dump(used))
        commit._aside(path, config.dump(used)).write_text("seed: 1")
        if newer:
            path.write_text("seed: 2")
        commit._put_back(path)
        assert path.read_text() == ("seed: 2" if newer else "seed: 1") and [item.name for item in tmp_path.iterdir()] == ["params.yaml"]


def test_metrics_and_plots_show_the_report(tmp_path: Path) -> None:
    commit.prepare_repository(tmp_path)
    report = Workspace(tmp_path).folder("report")
    report.mkdir(parents=True)
    (report / "headline.json").write_text('{"steps": 2, "f1": {"before": 0.25, "after": 0.75, "difference": 0.5, "low": 0.4, "high": 0.6}}')
    (report / "curves.csv").write_text("step,reward,f1,searches,tokens\n1,0.1,0.2,2,30\n2,0.3,0.4,2,31\n")
    shown = json.loads(commit.dvc(tmp_path, "metrics", "show", "--json"))
    assert shown[""]["data"]["artifacts/report/headline.json"]["data"]["f1"]["difference"] == 0.5
    page = Path(commit.dvc(tmp_path, "plots", "show").strip().removeprefix("file://"))
    assert page.is_file() and '"reward": "0.3"' in page.read_text()


def test_an_experiment_changes_a_parameter_and_metrics_are_compared(workspace: Workspace, tmp_path: Path) -> None:
    """`dvc exp run -S` in a repository of git and DVC, as the checkout is one."""
    space = Workspace(tmp_path / "checkout")
    space.root.mkdir()
    git(space.root, "init", "--quiet")
    commit.dvc(space.root, "init", "--quiet")
    commit.prepare_repository(space.root)
    for name in ("params.yaml", "data", "artifacts"):
        kept = workspace.root / name
        shutil.copytree(kept, space.root / name, symlinks=False) if kept.is_dir() else shutil.copy(kept, space.root / name)
    for name in ("train", "baseline", "evaluate"):
        space.folder(name).mkdir()
        (space.folder(name) / "made").write_text(name)
    headline(space, 0.75)
    resolved = config.load(space.root / "params.yaml")
    commit.record(space, (*BUILT, "report"), resolved)
    (space.root / ".gitignore").write_text("/data\n/artifacts\n")
    git(space.root, "add", "--all")
    git(space.root, "commit", "--quiet", "--message", "as built")

    other = resolved.encoder.dim // 2
    assert ran(commit.dvc(space.root, "exp", "run", "--set-param", f"encoder.dim={other}", "embed")) == ["embed"]
    now = config.load(space.root / "params.yaml")
    assert now == config.load(workspace.root / "params.yaml", [f"encoder.dim={other}"]), "DVC changed this value alone"
    assert manifest.load(space.folder("embed")).parameters["encoder"]["dim"] == other

    headline(space, 0.875)
    difference = json.loads(commit.dvc(space.root, "metrics", "diff", "--json"))["artifacts/report/headline.json"]
    assert difference == {"f1.after": {"old": 0.75, "new": 0.875, "diff": 0.125}}


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
