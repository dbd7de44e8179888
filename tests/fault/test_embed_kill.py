"""SIGKILL at every file operation of the embed stage: what was finished is kept, at most one shard is made twice.

The default suite tries a few points spread over the run, the long form every one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from research_rl.embedding import build
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import file_sha256
from tests.knowledge import context, store

ROWS, ENCODER = 600, {"dim": 16, "shard_rows": 100}

# The child counts audit events of file operations below its folder and kills itself at the given one.
CHILD = """
import os, signal, sys
from pathlib import Path
from research_rl.embedding import build
from tests.fault.test_embed_kill import ENCODER, context
root, fatal, seen = Path(sys.argv[1]), int(sys.argv[2]), 0
def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir") and str(arguments[0]).startswith(str(root)):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
build.run(context("embed", root, encoder=ENCODER))
print(seen)
"""


def _child(root: Path, fatal: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD, str(root), str(fatal)], capture_output=True, text=True)


def _finished(root: Path) -> dict[str, int]:
    """Return name and inode of every shard whose record fits it."""
    shards = root.glob("artifacts/.work/embed-*/vectors-*/*.npy")
    records = {path: path.parent.with_suffix(".json") for path in shards}
    return {
        path.name: path.stat().st_ino
        for path, record in records.items()
        if record.is_file() and json.loads(record.read_text())["files"][path.name] == file_sha256(path)
    }


def _trials(root: Path, share: int) -> None:
    store(root / "whole", ROWS)
    points = int(_child(root / "whole", -1).stdout)
    expected = manifest.load(root / "whole/artifacts/embeddings").hash
    assert points > 60
    kept_some = 0
    for fatal in range(1, points + 1, -(-points // share)):
        trial = root / f"t{fatal}"
        workspace = store(trial, ROWS)
        assert _child(trial, fatal).returncode == -9
        kept = _finished(trial)
        tried = len(list(trial.glob("artifacts/.work/embed-*/vectors-*")))
        assert tried <= 2 * len(kept) + 2  # what is there beside finished shards and their records belongs to one shard
        published = manifest.MANIFEST in {path.name for path in workspace.folder("embed").glob("*")}
        manifest.sweep(workspace.folder("embed"))
        if not published:
            build.run(context("embed", trial, encoder=ENCODER))
        assert manifest.load(workspace.folder("embed")).hash == expected
        if not published:
            assert {name: (workspace.folder("embed") / name).stat().st_ino for name in kept} == kept
            kept_some += bool(kept)
    assert kept_some


def test_a_kill_at_points_spread_over_the_run(tmp_path: Path) -> None:
    _trials(tmp_path, 5)


@pytest.mark.long
def test_a_kill_at_every_point(tmp_path: Path) -> None:
    _trials(tmp_path, 10_000)
