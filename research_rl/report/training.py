"""Read what training left behind: step metrics and rollouts. Knows the names under which they are logged; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.training.run.rollouts import read_lines, rollout_files

__all__ = ["SERIES", "Curves", "read_curves"]

SERIES = {
    "reward": "episode/reward",
    "f1": "episode/f1",
    "em": "episode/em",
    "format": "episode/format",
    "searches": "episode/searches",
    "tokens": "episode/model_tokens",
    "dev_f1": "dev/f1",
}
"""Metric names by series."""


@dataclass(frozen=True)
class Curves:
    """Training curves: for each series the steps that have it and their values, in order of steps."""

    series: dict[str, tuple[list[int], list[float]]]

    @property
    def steps(self) -> int:
        """The last step."""
        return max((steps[-1] for steps, _ in self.series.values()), default=0)

    def ends(self, name: str) -> tuple[float, float]:
        """Return the mean of the first and of the last tenth of a series (at least one step each); zeros when it is absent."""
        _, values = self.series.get(name, ([], []))
        if not values:
            return 0.0, 0.0
        # One step alone is too noisy: a step of the laptop profile is 16 questions.
        part = max(1, len(values) // 10)
        return sum(values[:part]) / part, sum(values[-part:]) / part

    def to_csv(self) -> str:
        """Return the curves as a table: a row a step, a column a series that is known; empty where a step lacks it."""
        names = [name for name in SERIES if name in self.series]
        columns = {name: dict(zip(*self.series[name], strict=True)) for name in names}
        steps = sorted({step for values in columns.values() for step in values})
        rows = [[str(step), *(f"{columns[name][step]:.6g}" if step in columns[name] else "" for name in names)] for step in steps]
        return "".join(",".join(row) + "\n" for row in [["step", *names], *rows])


def read_curves(folder: Path) -> Curves:
    """Read metrics.jsonl of a train artifact: one object per step, with its `metrics` by name."""
    rows: dict[int, dict[str, Any]] = {int(row["step"]): row["metrics"] for row in read_lines(folder / "metrics.jsonl")}
    series: dict[str, tuple[list[int], list[float]]] = {}
    for name, metric in SERIES.items():
        steps = [step for step in sorted(rows) if rows[step].get(metric) is not None]
        if steps:
            series[name] = (steps, [float(rows[step][metric]) for step in steps])
    start = rollout_files(folder, "dev").get(0)
    initial_f1 = [float(row["f1"]) for row in read_lines(start)] if start else []
    if initial_f1 and "dev_f1" in series:  # the first step's line has no room for what was played before it
        steps, values = series["dev_f1"]
        series["dev_f1"] = ([0, *steps], [sum(initial_f1) / len(initial_f1), *values])
    return Curves(series)
