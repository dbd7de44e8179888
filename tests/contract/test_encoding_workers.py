"""Several processes and a real Ray cluster of two nodes make the very artifact that one process makes; nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from research_rl.embedding import build
from research_rl.errors import ServiceError
from research_rl.pipeline import manifest
from research_rl.process._guardian import PR_SET_CHILD_SUBREAPER, descendants
from tests.encoder_model import write_model
from tests.knowledge import context, store
from tests.waiting import until

ROWS, SHARD = 1200, 100
DRIVER = """
import sys
from tests.contract.test_encoding_workers import Path, run
run(Path(sys.argv[1]), Path(sys.argv[2]), engine="ray", workers=2)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "whole", hidden=128, layers=6)


def built(root: Path, model: Path, rows: int = ROWS, **encoding: Any) -> str:
    """Build corpus and embeddings; return the hash of the embeddings' manifest."""
    workspace = store(root, rows)
    run(root, model, **encoding)
    found = manifest.load(workspace.folder("embed"))
    assert found.counts["vectors"] == rows
    return found.hash


def run(root: Path, model: Path, **encoding: Any) -> None:
    encoder = {"kind": "sentence", "model": str(model), "shard_rows": SHARD}
    build.run(context("embed", root, encoder=encoder, encoding=encoding))


def test_two_processes_make_the_same_artifact(tmp_path: Path, model: Path) -> None:
    assert built(tmp_path / "two", model, 500, workers=2) == built(tmp_path / "one", model, 500)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, model: Path) -> None:
    store(tmp_path, 100)
    with pytest.raises(ServiceError, match=r"ray_address='127.0.0.1:1' gives no cluster"):
        run(tmp_path, model, engine="ray", ray_address="127.0.0.1:1")


@pytest.mark.long
def test_a_cluster_of_two_nodes_makes_the_same_artifact_though_a_worker_is_killed(tmp_path: Path, model: Path) -> None:
    from ray.cluster_utils import Cluster

    expected = built(tmp_path / "here", model)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        killer = Killer(tmp_path / "there")
        assert built(tmp_path / "there", model, engine="ray", ray_address=cluster.address) == expected
        assert killer.killed
    finally:
        cluster.shutdown()


class Killer(Thread):
    """Kills the first process seen encoding a shard after another shard is finished."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.killed, self._root = 0, root
        self.start()

    def run(self) -> None:
        while not self.killed:
            if any(self._root.glob("artifacts/.work/embed-*/vectors-*.json")):
                for pid in processes(lambda path: b"ray::_encode_there" in (path / "cmdline").read_bytes()):
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid
                    break
            time.sleep(0.01)


def processes(fits: Callable[[Path], bool]) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if fits(path):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.long
def test_a_killed_driver_leaves_no_ray_and_its_shards_are_kept(tmp_path: Path, model: Path) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the driver become children of this process
    workspace, before = store(tmp_path, ROWS), set(descendants(os.getpid()))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(model)])
    try:
        assert until(lambda: any(workspace.work("").glob("embed-*/vectors-*.json")), over=lambda: driver.poll() is not None)
        assert len(set(descendants(os.getpid())) - before) > 3
    finally:
        driver.kill()
        driver.wait()
    assert until(lambda: not set(descendants(os.getpid())) - before)
    shards = workspace.work("").glob("embed-*/vectors-*.npy")
    kept = {path.name: path.stat().st_ino for path in shards if path.with_suffix(".json").exists()}
    run(tmp_path, model)
    assert {name: (workspace.folder("embed") / name).stat().st_ino for name in kept} == kept
