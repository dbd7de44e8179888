"""What a person reads at the end of a run: the result, what to open, what to try next.

Reads the report's manifest and the results of the evaluation after training.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from research_rl.evaluation.results import read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace

__all__ = ["closing"]

_LONGEST = 200
"""Characters of a question that is printed to be typed."""


def closing(workspace: Workspace) -> list[str]:
    """Return three lines about a finished run; whatever is behind `try:` can be typed as it stands.

    Raises ManifestError when there is no report, and DataError for results that are none.
    """
    folder = workspace.folder("report")
    facts = manifest.load(folder, verify=False).facts
    change = facts["difference"]["f1"]
    return [
        f"result: F1 {facts['before']['f1']:.3f} before and {facts['after']['f1']:.3f} after training, difference {change['mean']:+.3f} "
        f"(95 % interval {change['low']:+.3f} to {change['high']:+.3f}, {change['n']} held-out questions)",
        f"open:   {_short(folder / 'report.html')} and {_short(folder / 'trajectories.html')}; README.md lists what else can be done",
        f"try:    {_activated()}research ask {shlex.quote(_question(workspace))}",
    ]


def _question(workspace: Workspace) -> str:
    """Return a held-out question, one that the trained policy answered right where there is one."""
    results = [result for result in read_results(workspace.folder("evaluate")) if len(result.question) <= _LONGEST]
    asked = [result.question for result in sorted(results, key=lambda result: -result.em) if result.question.isprintable()]
    return asked[0] if asked else "Who founded it?"


def _short(path: Path) -> str:
    """Return the path as it can be typed here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _activated() -> str:
    """Return how to activate the environment of this interpreter, once, where `research` is not found without."""
    folder = Path(sys.prefix)
    # `make demo` activates nothing in the shell that started it.
    return f". {_short(folder)}/bin/activate && " if (folder / "bin/activate").is_file() else ""
