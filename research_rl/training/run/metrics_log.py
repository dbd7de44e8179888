"""One line of metrics per training step, gathered over all attempts. Knows JSON lines; knows no verl process.

Invariants of the file: steps are 1, 2, 3, … without a gap or a repetition, a step that was done again replaces the
earlier one, and a reader never sees half a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MetricsLog", "Tail", "numbers", "parsed"]


class MetricsLog:
    """The merged metrics of a run: `{"step": n, "metrics": {...}}` a line, in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[int(row["step"])] = row["metrics"]

    @property
    def last(self) -> int:
        """The newest step, 0 when there is none."""
        return max(self.rows, default=0)

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set a step's metrics and write the file."""
        self.rows[step] = dict(metrics)
        self._write()

    def rewind(self, step: int) -> None:
        """Forget later steps: they are about to be done again."""
        self.rows = {done: metrics for done, metrics in self.rows.items() if done <= step}
        self._write()

    def until(self, step: int) -> str:
        """Return the file's text up to a step."""
        return "".join(
            json.dumps({"step": done, "metrics": self.rows[done]}, sort_keys=True) + "\n" for done in sorted(self.rows) if done <= step
        )

    def missing(self, step: int) -> list[int]:
        """Return the steps up to `step` that have no metrics."""
        return [number for number in range(1, step + 1) if number not in self.rows]

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        # The whole file: a step that was done again has its earlier line in the middle.
        temporary.write_text(self.until(self.last), encoding="utf-8")
        temporary.replace(self.path)


class Tail:
    """Reads the whole lines that were added to a growing file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> list[str]:
        """Return new complete lines without their ends; none while the file does not exist."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            block = stream.read()
        # Without a line end this is nothing: -1 + 1.
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def parsed(line: str) -> dict[str, Any] | None:
    """Return verl's metrics of one step, `{"step": n, "data": {...}}`, or None when the line was torn by a crash or a full disk."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("data"), dict) else None


def numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of verl's step metrics; it also logs texts and nulls."""
    finite: dict[str, float] = {}
    for name, value in data.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            finite[name] = float(value)
    return finite
