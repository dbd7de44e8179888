"""A forced training begins at step 0 beside the earlier run, which stays; a run of more steps is published up to a lower one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from research_rl.config import Config
from research_rl.errors import ModelError, ServiceError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace
from research_rl.process.services import Endpoint
from research_rl.training import train
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.overrides import Paths
from research_rl.training.run.remote import Store
from research_rl.training.run.run import AttemptOutcome, Run
from research_rl.training.train import publish, start_anew


def run_of(work: Path, step: int) -> Path:
    path = work / "checkpoints" / f"global_step_{step}"
    path.mkdir(parents=True)
    (path / "data.pt").write_text("trained")
    return path


def test_a_forced_run_starts_anew_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    work, said = tmp_path / "train-0123", list[str]()
    run_of(work, 6)
    start_anew(work, None, lambda text, share: said.append(text))
    assert not (work / "checkpoints").exists()
    assert (tmp_path / "earlier-train-0123-1/checkpoints/global_step_6/data.pt").read_text() == "trained"
    assert str(tmp_path / "earlier-train-0123-1") in said[0]


@pytest.mark.parametrize("force", [True, False])
def test_the_stage_begins_anew_only_when_it_is_forced(force: bool, tmp_path: Path) -> None:
    """The stage itself, up to the policy that is missing here: force has to reach the run that stands, and nothing else may."""
    space = Workspace(tmp_path)
    for name in ("policy", "prepare"):
        with manifest.publish(space.folder(name), name, "x", {}) as staging:
            if name == "prepare":
                parquet.write_table(pa.table({"question": ["Who?"]}), staging.path / "train.parquet")
    parents = {name: manifest.load(space.folder(name)) for name in ("policy", "prepare")}
    work = space.work(f"train-{train.work_key(Config(), parents)}")
    run_of(work, 6)
    said = list[str]()
    context = Context(STAGES["train"], Config(), space, parents, lambda text, share: said.append(text), force=force)
    with pytest.raises(ModelError, match="artifacts/policy"):
        train.run(context)
    assert (work / "checkpoints/global_step_6").is_dir() is not force
    assert [path.name for path in work.parent.glob("earlier-*")] == ([f"earlier-{work.name}-1"] if force else [])
    assert any("the earlier run is kept in" in text for text in said) is force


def test_a_forced_run_that_was_killed_goes_on_when_it_is_forced_again(tmp_path: Path) -> None:
    work = tmp_path / "train-0123"
    run_of(work, 6)
    start_anew(work, None, lambda text, share: None)
    run_of(work, 2)
    start_anew(work, None, lambda text, share: None)
    assert (work / "checkpoints/global_step_2").is_dir()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["earlier-train-0123-1", "train-0123"]


def test_a_forced_run_does_not_begin_while_it_is_unknown_what_s3_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    work = tmp_path / "train-0123"
    run_of(work, 6)
    with pytest.raises(ServiceError, match=r"trainer\.upload: s3://bucket/runs/train-0123 cannot be read"):
        start_anew(work, Store.parse("s3://bucket/runs", work.name), lambda text, share: None)
    assert (work / "checkpoints/global_step_6").is_dir(), "nothing was moved"


def test_a_published_lower_step_holds_nothing_of_later_ones(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    work = space.work("train-0123")
    checkpoint = run_of(work, 2)
    (work / "rollouts/dev").mkdir(parents=True)
    for step in (1, 2, 3):
        for folder in ("rollouts", "rollouts/dev"):
            (work / folder / f"{step:06d}.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    rows = [{"step": step, "metrics": {"loss": float(step)}} for step in (1, 2, 3)]
    (work / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate({"train": {"steps": 2}})
    paths = Paths(tmp_path, tmp_path / "t", tmp_path / "d", work, tmp_path / "ray")
    context = Context(STAGES["train"], config, space, {}, lambda text, share: None)
    publish(context, Run(config, paths, tmp_path, "u"), AttemptOutcome(Checkpoint(2, checkpoint), 1, 0), 0)
    folder = space.folder("train")
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows[:2]
    assert sorted(path.relative_to(folder).as_posix() for path in (folder / "rollouts").rglob("*.gz")) == [
        f"rollouts/{name}.jsonl.gz" for name in ("000001", "000002", "dev/000001", "dev/000002")
    ]
    assert manifest.load(folder).facts["last"] == {"loss": 2.0}
    assert len(list((work / "rollouts").rglob("*.gz"))) == 6, "the run itself keeps all of its steps"


def test_a_run_whose_retriever_was_replaced_is_set_aside_unpublished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> None:
        raise ServiceError("the retriever at u serves index 1, but the workspace's is 2")

    monkeypatch.setattr(train, "require_same_index", differs)
    work = tmp_path / "train-0123"
    run_of(work, 6)
    context = Context(STAGES["train"], Config(), Workspace(tmp_path), {}, lambda text, share: None)
    with pytest.raises(ServiceError, match=r"serves index 1.* not published .*earlier-train-0123-1; the next run trains from step 0$"):
        train._require_same_index(context, Endpoint("u", None), work)
    assert not work.exists()
    assert (tmp_path / "earlier-train-0123-1/checkpoints/global_step_6").is_dir()
