"""P13: `research --help` against the help of the tools it sits beside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.duel import Duel, alternate, cpu_seconds

BIN = Path(sys.executable).parent


def run(quick: bool) -> Iterator[Duel]:
    """Yield one duel a peer, in CPU-seconds a call."""
    for peer in ("dvc", "prefect", "mlflow"):
        yield alternate(
            "P13",
            f"research --help against {peer} --help",
            "CPU-seconds",
            _help("research"),
            _help(peer),
            1.0,
            3 if quick else 7,
            less=True,
        )


def _help(command: str) -> Callable[[], float]:
    def measure() -> float:
        started = cpu_seconds()
        subprocess.run([BIN / command, "--help"], check=True, capture_output=True)
        return cpu_seconds() - started

    return measure
