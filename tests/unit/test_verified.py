"""An unchanged file is read once; one that may have changed is read again."""

from __future__ import annotations

import os
import sqlite3
import time
from hashlib import sha256
from pathlib import Path

import pytest

from research_rl import config
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.pipeline.verified import Verified
from research_rl.planning.plan import state

SIZE = 4 << 20


def read_bytes() -> int:
    """Bytes that this process has read so far, as the kernel counts them."""
    return int(next(line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")))


def later() -> int:
    """A clock by which every file of a test is old enough to be remembered."""
    return time.time_ns() + 10**10


def known(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def settle(root: Path) -> None:
    """Wait until the files of `root` are older than the coarsest clock of a file system."""
    newest = max(path.stat().st_ctime_ns for path in root.rglob("*") if path.is_file())
    while time.time_ns() <= newest + 2_100_000_000:
        time.sleep(0.05)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_an_unchanged_file_is_read_once(tmp_path: Path, big: Path) -> None:
    memory, counts = tmp_path / "work" / "verified.sqlite", list[int]()
    for _ in range(3):
        before = read_bytes()
        assert Verified(memory, clock=later).sha256(big) == known(big)
        counts.append(read_bytes() - before - SIZE)  # `known` reads it too
    assert counts[0] >= SIZE
    assert max(counts[1:]) < SIZE // 4
    before = read_bytes()
    Verified(memory, reread=True, clock=later).sha256(big)
    assert read_bytes() - before >= SIZE


def test_a_file_that_was_altered_in_place_is_noticed_though_size_and_time_are_as_before(tmp_path: Path, big: Path) -> None:
    verified = Verified(tmp_path / "verified.sqlite", clock=later)
    verified.sha256(big)
    stamp = big.stat()
    with big.open("r+b") as stream:
        stream.write(b"altered")
    os.utime(big, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert verified.sha256(big) == known(big)


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, big: Path) -> None:
    """A second change within the clock's granularity would bear the same time."""
    memory = tmp_path / "verified.sqlite"
    now = big.stat().st_ctime_ns
    Verified(memory, clock=lambda: now + 1_000_000_000).sha256(big)
    before = read_bytes()
    Verified(memory, clock=later).sha256(big)
    assert read_bytes() - before >= SIZE


@pytest.mark.parametrize("damage", ["not a database", ""])
def test_a_damaged_memory_costs_time_and_no_result(tmp_path: Path, big: Path, damage: str) -> None:
    memory = tmp_path / "verified.sqlite"
    memory.write_text(damage * 1000)
    for _ in range(2):
        assert Verified(memory, clock=later).sha256(big) == known(big)
    assert sqlite3.connect(memory).execute("SELECT count(*) FROM verified").fetchone() == (1,)


def test_a_memory_that_cannot_be_written_costs_no_result(tmp_path: Path, big: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Verified(tmp_path / "file" / "verified.sqlite", clock=later).sha256(big) == known(big)


def test_a_second_status_reads_no_artifact_and_verify_reads_all(tmp_path: Path) -> None:
    """Every stage hashed its parents anew, and status all there is: half a terabyte for a corpus of Wikipedia's size."""
    resolved, workspace = config.load_profile("laptop"), Workspace(tmp_path)
    chosen = config.config_hash(config.located(resolved, tmp_path), STAGES["download"].sections)
    with manifest.publish(workspace.folder("download"), "download", chosen, {}) as staging:
        (staging.path / "corpus.jsonl").write_bytes(os.urandom(SIZE))
    settle(workspace.folder("download"))
    counts = list[int]()
    for reread in (False, False, True):
        before = read_bytes()
        assert state(resolved, workspace, reread=reread)[0].state == "current"
        counts.append(read_bytes() - before)
    assert counts[0] >= SIZE
    assert counts[1] < SIZE // 4
    assert counts[2] >= SIZE
    with (workspace.folder("download") / "corpus.jsonl").open("r+b") as stream:
        stream.write(b"altered")
    assert state(resolved, workspace)[0].state == "torn"
