"""What a person reads at the end of a run: the result, what to open, what to try next. Reads the report's manifest alone."""

from __future__ import annotations

import sys
from pathlib import Path

from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace

__all__ = ["closing"]


def closing(workspace: Workspace) -> list[str]:
    """Return three lines about a finished run. Raises ManifestError when there is no report."""
    folder = workspace.folder("report")
    facts = manifest.load(folder, verify=False).facts
    change = facts["difference"]["f1"]
    return [
        f"result: F1 {facts['before']['f1']:.3f} before and {facts['after']['f1']:.3f} after training, difference {change['mean']:+.3f} "
        f"(95 % interval {change['low']:+.3f} to {change['high']:+.3f}, {change['n']} held-out questions)",
        f"open:   {_short(folder / 'report.html')} and {_short(folder / 'trajectories.html')}",
        f'try:    {_activated()}research ask "..." with a question of data/test.jsonl, or a row of "I want to ..." in README.md',
    ]


def _short(path: Path) -> str:
    """Return the path as it can be typed here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _activated() -> str:
    """Return how to activate the environment of this interpreter, once, where `research` is not found without."""
    folder = Path(sys.prefix)
    # `make demo` activates nothing in the shell that started it.
    return f". {_short(folder)}/bin/activate && " if (folder / "bin/activate").is_file() else ""
