"""Run duels by name: `python -m benchmarks P3 P13` (all without names), `--quick` for about a minute each.

Prints one JSON line a duel; the lines and a plot land in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DUELS = {
    "P1": "benchmarks.service",
    "P2": "benchmarks.health",
    "P3": "benchmarks.exact_search",
    "P4": "benchmarks.encoding",
    "P6": "benchmarks.server_start",
    "P5": "benchmarks.index_build",
    "P7": "benchmarks.resume",
    "P8": "benchmarks.rollouts",
    "P9": "benchmarks.turn_overhead",
    "P10": "benchmarks.reward",
    "P11": "benchmarks.bm25",
    "P13": "benchmarks.start_up",
    "P14": "benchmarks.validation",
    "P15": "benchmarks.late_replica",
    "P16": "benchmarks.two_tier",
    "P17": "benchmarks.refresh",
    "P18": "benchmarks.agent_service",
    "P19": "benchmarks.model_servers",
    "P20": "benchmarks.workers",
}


def main() -> int:
    """Run the named duels; return 1 when a goal is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="Duels of this project against its peers.")
    parser.add_argument("names", nargs="*", metavar="P", help=f"which duels: {', '.join(DUELS)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(DUELS):
        parser.error(f"{sorted(unknown)} is not among {list(DUELS)}")
    held = True
    for name in arguments.names or DUELS:
        rows: list[dict[str, Any]] = []
        for duel in importlib.import_module(DUELS[name]).run(arguments.quick):
            rows.append({**asdict(duel), "holds": duel.holds})
            print(json.dumps(rows[-1]), flush=True)
        if not rows:
            print(f"{name} measured nothing, what it needs is not there ({DUELS[name]} says what); earlier results stay", file=sys.stderr)
            continue
        held &= all(row["holds"] for row in rows)
        _keep(name, rows)
    return 0 if held else 1


def _keep(name: str, rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes.barh([row["what"] for row in rows], [row["ratio"] for row in rows])
    axes.scatter([row["goal"] for row in rows], range(len(rows)), marker="|", s=300, color="black", label="goal")
    axes.set_xlabel("ratio to the peer (above 1: ours is better)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
