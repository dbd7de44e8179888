"""P6: from start to first answer, and what one more server process costs in memory, ours against the blocking pattern.

Start counts from the process's start, imports included; the opening alone (manifests, index, passages, encoder's weights not
included) is measured in a process that has imported everything. Memory is what a second process holds for itself (USS).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.duel import Duel, alternate
from benchmarks.servers import ROWS, Server, ours, peer, workspace
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace

MIB = 1 << 20
_OPENING = """
import json, sys, time
from pathlib import Path
import torch, faiss, sentence_transformers
from research_rl.config import RetrieverConfig
from research_rl.pipeline.stages import Workspace
from research_rl.retriever.retriever import Retriever
started = time.perf_counter()
marks = []
Retriever.open(Workspace(Path(sys.argv[1])), RetrieverConfig(verify=False), lambda text: marks.append(time.perf_counter() - started))
print(json.dumps({"index": marks[1], "ready": marks[-1]}))
"""


def run(quick: bool) -> Iterator[Duel]:
    """Yield start, opening and memory."""
    rounds = 2 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        made = workspace(Path(folder))
        yield alternate(
            "P6", f"start to first answer, {ROWS:,} passages", "s", _start(ours, made), _start(peer, made), 1.0, rounds, less=True
        )
        opened = [_opening(made) for _ in range(rounds)]
        for key, name in (
            ("index", "index and passages opened after imports"),
            ("ready", "index, passages, encoder opened and canary found"),
        ):
            seconds = statistics.median(found[key] for found in opened)
            yield Duel("P6", f"{name}, peer: the limit of 1 s", "s", seconds, 1.0, 1.0 / seconds, 1.0, rounds)
        (a, mapped), (b, _) = _second(ours, made), _second(peer, made)
        yield Duel("P6", "memory of a second server process (USS)", "MiB", a, b, b / a, 1.0, 1)
        yield Duel("P6", "of it pages of index and passages, peer: a limit of 1 MiB", "MiB", mapped, 1.0, 1.0 / max(mapped, 0.001), 1.0, 1)


def _start(side: Callable[[Workspace], AbstractContextManager[Server]], made: Workspace) -> Callable[[], float]:
    def measure() -> float:
        with side(made) as server:
            return server.first_answer_s

    return measure


def _opening(made: Workspace) -> dict[str, float]:
    command = [sys.executable, "-c", _OPENING, str(made.root)]
    return json.loads(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)


def _second(side: Callable[[Workspace], AbstractContextManager[Server]], made: Workspace) -> tuple[float, float]:
    """Return the second process's own memory, and the private part of its mappings of the artifacts, in MiB."""
    with side(made) as first, side(made) as second:
        for server in (first, second):
            server.load(4, 2.0, 1)
        maps = [item for item in second.process.memory_maps() if str(made.root) in item.path]
        private = sum(item.private_clean + item.private_dirty for item in maps if "encoder" not in item.path)
        return second.process.memory_full_info().uss / MIB, private / MIB
