"""P9: what a turn costs beside the engine: our agent loop in verl's base class against verl's own ToolAgentLoop.

Both play the same episodes in one process of the policy environment (`benchmarks/peers/verl_tool_loop.py`): engine and search
answer at once, so that all CPU time is the loops' own. verl's includes the making of a loop for every episode, as its worker does it;
our worker makes one for all. Ours includes grading and the record on disk, shared out over the turns. Judged by the medians of
many short rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.duel import Duel
from research_rl.config import Config
from research_rl.paths import CHECKOUT
from research_rl.training.run.run import interpreter

LIMIT_US = 200.0
SCRIPT = Path(__file__).parent / "peers" / "verl_tool_loop.py"


def run(quick: bool) -> Iterator[Duel]:
    """Yield ours against verl's loop, and ours against the limit of 200 microseconds."""
    rounds, episodes = (40, 8) if quick else (120, 8)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(interpreter(Config())), str(SCRIPT), folder, str(rounds), str(episodes)]
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": "", "HOME": folder}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    ours, peer = (statistics.median(found[name]) for name in ("ours", "peer"))
    unit = "CPU-microseconds a turn"
    yield Duel("P9", "turn, against verl's ToolAgentLoop", unit, ours, peer, peer / ours, 1.0, rounds)
    yield Duel("P9", "turn, against the limit", unit, ours, LIMIT_US, LIMIT_US / ours, 1.0, rounds)
