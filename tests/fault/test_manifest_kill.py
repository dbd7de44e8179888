"""SIGKILL at every system call that publishes an artifact: a reader never accepts a torn one.

RESEARCH_FAULT_TRIALS sets the number of kills (default: one for each write point).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from research_rl.errors import ManifestError
from research_rl.pipeline import manifest

# The child counts audit events of file operations and kills itself at the given one.
CHILD = """
import os, signal, sys
from pathlib import Path
from research_rl.pipeline import manifest
target, generation, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0
def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir"):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
with manifest.publish(target, "index", "c", {}) as staging:
    for name in ("a", "b"):
        (staging.path / name).write_text(generation * 1000)
    staging.counts["rows"] = 1
print(seen)
"""


def _publish(target: Path, generation: str, fatal: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD, str(target), generation, str(fatal)], capture_output=True, text=True)


def test_kill_at_every_point(tmp_path: Path) -> None:
    points = int(_publish(tmp_path / "count", "x", -1).stdout)
    points = max(points, int(_publish(tmp_path / "count", "y", -1).stdout))
    assert points > 10
    trials = int(os.environ.get("RESEARCH_FAULT_TRIALS", points))
    accepted = {"old": 0, "new": 0}
    for trial in range(trials):
        target = tmp_path / f"t{trial}" / "index"
        assert _publish(target, "o", -1).returncode == 0
        _publish(target, "n", 1 + trial % points)
        manifest.sweep(target)
        manifest.load(target)
        generation = (target / "a").read_text()[0]
        assert (target / "b").read_text()[0] == generation
        accepted["old" if generation == "o" else "new"] += 1
        assert [path.name for path in target.parent.iterdir()] == ["index"]
    assert accepted["old"] > 0 and accepted["new"] > 0


def test_first_publication_killed_anywhere_leaves_nothing_readable(tmp_path: Path) -> None:
    points = int(_publish(tmp_path / "count", "x", -1).stdout)
    for fatal in range(1, points):
        target = tmp_path / f"t{fatal}" / "index"
        _publish(target, "n", fatal)
        manifest.sweep(target) if target.parent.exists() else None
        if not (target / manifest.MANIFEST).exists():
            with pytest.raises(ManifestError):
                manifest.load(target)
            continue
        manifest.load(target)
