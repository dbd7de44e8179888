"""Run the checks tier by tier, all of them even when one fails, and end with a table of what passed and how long it took.

Usage: tests/run.py [lint|unit|contract|fault|flow|long ...]   (all but long when none is named)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / ".venv/bin/python")
BIN = ROOT / ".venv/bin"
LINT = [
    [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
    [str(BIN / "ruff"), "check", "--quiet", "."],
    [str(BIN / "pyright"), "--warnings"],
    [str(BIN / "lint-imports"), "--no-cache"],
]
PYTEST = [PYTHON, "-m", "pytest", "--durations=10"]
# A unit test keeps one core busy at most; the tiers after it start processes of their own, which share the cores.
TIERS: dict[str, list[list[str]]] = {
    "lint": LINT,
    "unit": [[*PYTEST, "-n", "2", "--dist", "loadfile", "tests/unit"]],
    **{tier: [[*PYTEST, f"tests/{tier}"]] for tier in ("contract", "fault", "flow")},
    "long": [[*PYTEST, "-m", "long", "tests"]],
}
NO_TESTS = 5
"""pytest's exit code when it collected nothing."""


@dataclass
class Outcome:
    """What became of one tier; a check without a report of its own, like a linter, counts as one."""

    tier: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def count(self, code: int, report: Path) -> None:
        """Add one command: the tests of its report, or the command itself. A command that failed without a failed test counts as one."""
        suites = list(ElementTree.parse(report).getroot().iter("testsuite")) if report.is_file() else []
        total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
        failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
        self.skipped += skipped
        self.failed += failed or int(code not in (0, NO_TESTS))
        self.passed += total - skipped - failed if suites else int(code == 0)


def run(tier: str) -> Outcome:
    """Run every command of a tier; their output is shown as it comes."""
    outcome, started = Outcome(tier), time.monotonic()
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for command in TIERS[tier]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            reporting = [f"--junitxml={report}"] if "pytest" in command else []
            outcome.count(subprocess.run([*command, *reporting], cwd=ROOT, env=environment).returncode, report)
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Return one line a tier and one for the whole."""
    whole = Outcome("all", *(sum(getattr(outcome, name) for outcome in outcomes) for name in ("passed", "failed", "skipped", "seconds")))
    rows = [f"{'tier':10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    return "\n".join([*rows, *(f"{o.tier:10}{o.passed:8}{o.failed:8}{o.skipped:9}{o.seconds:9.0f}" for o in (*outcomes, whole))])


def main(names: list[str]) -> int:
    """Run the named tiers, print the table; return 1 when anything failed, 2 for an unknown tier."""
    if unknown := [name for name in names if name not in TIERS]:
        print(f"unknown tier {', '.join(unknown)}; the tiers are {', '.join(TIERS)}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    for tier in names or [tier for tier in TIERS if tier != "long"]:
        print(f"== {tier}", flush=True)
        outcomes.append(run(tier))
    print(f"\n{table(outcomes)}", flush=True)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
