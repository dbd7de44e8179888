"""Pauses of searching, noted by the agent workers and read by the supervisor. Knows JSON lines and clocks; knows no retriever.

Invariants: (1) a pause counts once however many workers share it; (2) a pause whose end was never noted, because its
worker died, counts for `longest_s` at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from research_rl.pipeline import json_lines
from research_rl.retriever.gate import Note
from research_rl.training.run.metrics_log import Tail

__all__ = ["Pauses", "append"]


def append(folder: Path, note: Note) -> None:
    """Add a note to this worker's file."""
    json_lines.append(json_lines.own_file(folder), note.to_json())


class Pauses:
    """What the workers of one attempt noted in `folder`, read as it grows."""

    def __init__(self, folder: Path, longest_s: float) -> None:
        self._folder, self._longest_s = folder, longest_s
        self._tails: dict[Path, Tail] = {}
        self._spans: dict[Path, list[list[float]]] = {}

    def news(self) -> list[dict[str, Any]]:
        """Return the notes added since the last look, oldest first."""
        notes: list[dict[str, Any]] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in self._tails.setdefault(path, Tail(path)).lines():
                note = json.loads(line)
                self._place(self._spans.setdefault(path, []), note)
                notes.append(note)
        return sorted(notes, key=lambda note: note["at"])

    def seconds(self, since: float, until: float) -> float:
        """Return for how much of the time from `since` to `until` any worker paused.

        Both are Unix time, which the workers note: the monotonic clock of another machine means nothing here.
        """
        spans = sorted((max(start, since), min(end, until)) for spans in self._spans.values() for start, end in spans)
        total, reached = 0.0, since
        for start, end in spans:
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total

    def _place(self, spans: list[list[float]], note: dict[str, Any]) -> None:
        if note["event"] == "paused":
            # Its latest possible end, until the real one is noted.
            spans.append([note["at"], note["at"] + self._longest_s])
        elif spans:
            spans[-1][1] = note["at"]
