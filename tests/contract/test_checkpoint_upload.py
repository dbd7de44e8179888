"""Checkpoints in a real S3 server: whole or absent there, never in training's way, and enough to go on from on an empty machine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from research_rl.errors import ConfigError
from research_rl.training.run import checkpoints
from research_rl.training.run.checkpoints import SEAL, Checkpoint
from research_rl.training.run.remote import Store, Uploader, restore
from research_rl.training.run.run import Run
from research_rl.training.run.supervise import supervise
from tasks.local.stack import Stack
from tests.unit.test_training_checkpoints import write_checkpoint
from tests.unit.test_training_supervise import Listener, ignore, make_run, read_metrics
from tests.waiting import until


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A real S3 server; its variables stand in this process's environment for the module."""
    stack = Stack(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESEARCH_S3_PORT", "0")
        try:
            for name, value in stack.s3().items():
                patch.setenv(name, value)
            yield "s3://research-rl/checkpoints"
        finally:
            stack.down()


def sealed(folder: Path, step: int) -> Checkpoint:
    path = write_checkpoint(folder, step)
    checkpoints.seal(path)
    return Checkpoint(step, path)


def test_a_run_leaves_its_newest_checkpoints_and_a_fresh_machine_goes_on(bucket: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [{"pause": 0.6}], steps=3)
    here = Run(run.config, run.paths, run.services, "u", store=Store.parse(bucket, "run-1"))
    supervise(here, Listener(), ignore)
    assert here.store
    held = sorted(here.store.sealed(here.store.client()))
    # On a busy machine two checkpoints may be finished between two looks; only the newer of them is then sent.
    assert held[-1] == 3 and len(held) <= here.config.trainer.keep_checkpoints

    fresh = make_run(tmp_path / "b", [{}], steps=5)
    there = Run(fresh.config, fresh.paths, fresh.services, "u", store=here.store)
    told: list[str] = []
    listener = Listener()
    assert supervise(there, listener, lambda text, share: told.append(text)).checkpoint.step == 5
    assert "resuming from 3" in (there.logs / "attempt_1.log").read_text()
    assert any("checkpoint of step 3 came from S3" in text for text in told)
    assert [row["step"] for row in read_metrics(there)] == [1, 2, 3, 4, 5] == listener.steps
    assert [row["metrics"]["loss"] for row in read_metrics(there)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert all(len(gzip.decompress((there.rollouts / f"{step:06d}.jsonl.gz").read_bytes()).splitlines()) == 4 for step in range(1, 6))


def test_an_upload_cut_before_the_seal_is_absent_and_a_damaged_one_is_passed_over(bucket: str, tmp_path: Path) -> None:
    store, work = Store.parse(bucket, "run-2"), tmp_path / "work"
    uploader = Uploader(store, work_folder(work), 3, print)
    for step in (1, 2, 3):
        uploader.offer(sealed(work / "checkpoints", step))
    shutil.rmtree(work / "checkpoints")
    assert uploader.close(600) and uploader.sent == [1, 2, 3], "pruned files must still arrive"
    client = store.client()
    client.delete_object(Bucket=store.bucket, Key=store.key("global_step_3", SEAL))
    client.put_object(Bucket=store.bucket, Key=store.key("global_step_2", "data.pt"), Body=b"another file")
    told: list[str] = []
    found = restore(store, work, work / "checkpoints", 0, 9, told.append)
    assert found and found.step == 1 and checkpoints.fault(found.path, verify=True) is None
    assert any("step 2 in S3 is passed over: data.pt" in text for text in told)
    assert restore(store, work, work / "checkpoints", 1, 9, told.append) is None


def test_an_unreachable_server_costs_messages_and_the_next_run_sends_the_rest(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, work, told = Store.parse(bucket, "run-3"), work_folder(tmp_path / "work"), list[str]()
    address = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    uploader = Uploader(store, work, 2, told.append)
    uploader.offer(sealed(work / "checkpoints", 1))
    until(lambda: told)
    assert not uploader.close(0) and "not in S3 yet" in told[0]
    assert restore(store, work, work / "checkpoints", 1, 9, told.append) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    later = Uploader(store, work, 2, told.append)
    assert later.close(600) and later.sent == [1] and json.dumps(store.sealed(store.client())[1])


def test_an_address_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.upload='bucket/x' is not of the form s3://"):
        Store.parse("bucket/x", "run")


def work_folder(path: Path) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    return path
