"""Run the checks tier by tier, all of them even when one fails, and end with a table of what passed and how long it took.

Usage: tests/run.py [--minutes N] [lint|unit|contract|fault|flow|long|infra ...]   (all but long and infra when none is named)

contract, fault and flow share one row of the table where they are named together: they run at the same time. lint, which leaves a core
idle, runs beside the tier after it and is shown when that has ended.

With --minutes, what has not ended by then is stopped and named as not run; it counts neither as passed nor as failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO
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
BESIDE_EACH_OTHER = ["--dist", "loadfile", "--no-loadscope-reorder"]
# A file for each core. Where tests start processes, they wait a third of the time: one file more takes the cores meanwhile.
COMPUTING = [*PYTEST, "-n", "2", *BESIDE_EACH_OTHER]
WAITING = [*PYTEST, "-n", "3", *BESIDE_EACH_OTHER]
JOINED = ("flow", "contract", "fault")
"""Tiers that one pytest runs when they are named together, the longest file first, so that neither core idles between them."""
# The shortest come first: should the time not be enough for all, the most of them ran.
TIERS: dict[str, list[list[str]]] = {
    "lint": LINT,
    "unit": [[*COMPUTING, "tests/unit"]],
    **{tier: [[*WAITING, f"tests/{tier}"]] for tier in JOINED},
    "long": [[*PYTEST, "-m", "long", "tests"]],
    "infra": [[*PYTEST, "-m", "infra", "tests/infra"]],
}
ON_DEMAND = ("long", "infra")
"""Tiers that run only when they are named."""
NO_TESTS = 5
"""pytest's exit code when it collected nothing."""
CLOSING_S = 120
"""For a stopped tier to end its services and write its report."""


@dataclass
class Outcome:
    """What became of one tier; a check without a report of its own, like a linter, counts as one."""

    tier: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stopped: int = 0

    def count(self, code: int | None, report: Path) -> None:
        """Add one command: the tests of its report, or the command itself. A command that failed without a failed test counts as one.

        `code` is None for a command whose time was up.
        """
        suites = list(ElementTree.parse(report).getroot().iter("testsuite")) if report.is_file() else []
        total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
        failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
        self.skipped += skipped
        self.failed += failed or int(code not in (0, NO_TESTS, None))
        self.stopped += int(code is None)
        self.passed += total - skipped - failed if suites else int(code == 0)


def planned(tiers: list[str]) -> dict[str, list[list[str]]]:
    """Return the commands by the name of their row in the table: one row a tier, one for those that are joined."""
    joined = [tier for tier in JOINED if tier in tiers]
    plan = {tier: TIERS[tier] for tier in tiers if tier not in joined}
    return plan | ({"+".join(joined): [[*WAITING, *(f"tests/{tier}" for tier in joined)]]} if joined else {})


def run(tier: str, commands: list[list[str]], ends: float, output: IO[bytes] | None = None) -> Outcome:
    """Run the commands of a row of the table until `ends` (monotonic seconds); their output goes to `output`, or is shown as it comes."""
    outcome, started = Outcome(tier), time.monotonic()
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            reporting = [f"--junitxml={report}"] if "pytest" in command else []
            outcome.count(exit_code([*command, *reporting], ends, output), report)
    outcome.seconds = time.monotonic() - started
    return outcome


def run_all(rows: dict[str, list[list[str]]], ends: float) -> list[Outcome]:
    """Run the rows one after the other, lint beside the one after it."""
    first = [rows.pop("lint")] if "lint" in rows and len(rows) > 1 else []
    outcomes = list[Outcome]()
    with ThreadPoolExecutor(1) as beside, tempfile.TemporaryFile() as output:
        linting = [beside.submit(run, "lint", commands, ends, output) for commands in first]
        for name, commands in rows.items():
            print(f"== {name}", flush=True)
            outcomes.append(run(name, commands, ends))
            if linting:
                outcomes.insert(0, linting.pop().result())
                output.seek(0)
                print(f"== lint\n{output.read().decode(errors='replace')}", flush=True)
    return outcomes


def exit_code(command: list[str], ends: float, output: IO[bytes] | None = None) -> int | None:
    """Run a command and return its exit code, or None when it was not started or was stopped because the time was up."""
    if time.monotonic() >= ends:
        return None
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    try:
        return process.wait(None if ends == float("inf") else ends - time.monotonic())
    except subprocess.TimeoutExpired:
        # pytest ends its fixtures, hence the services they started, and writes its report on an interrupt only.
        process.send_signal(signal.SIGINT)
    try:
        process.wait(CLOSING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def table(outcomes: list[Outcome], seconds: float) -> str:
    """Return one line a tier and one for the whole, which took `seconds`, and one that names what the time was not enough for."""
    whole = Outcome("all", *(sum(getattr(outcome, name) for outcome in outcomes) for name in ("passed", "failed", "skipped")), seconds)
    rows = [f"{'tier':20}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    rows += [f"{o.tier:20}{o.passed:8}{o.failed:8}{o.skipped:9}{o.seconds:9.0f}" for o in (*outcomes, whole)]
    stopped = ", ".join(outcome.tier for outcome in outcomes if outcome.stopped)
    return "\n".join([*rows, *([f"the time was up: not run, or not to the end: {stopped}"] if stopped else [])])


def main(arguments: list[str]) -> int:
    """Run the named tiers, print the table; return 1 when anything failed, 2 for an unknown tier."""
    parser = argparse.ArgumentParser(prog="tests/run.py", description=__doc__.split("\n")[0] if __doc__ else None)
    unnamed = f"all but {' and '.join(ON_DEMAND)} when none is named"
    parser.add_argument("tiers", nargs="*", metavar="tier", help=f"of {', '.join(TIERS)}; {unnamed}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop what has not ended by then")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.tiers if name not in TIERS]:
        print(f"unknown tier {', '.join(unknown)}; the tiers are {', '.join(TIERS)}", file=sys.stderr)
        return 2
    # A shell starts what runs in its background with interrupts ignored, which children inherit; they are stopped by one, see exit_code.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = planned(options.tiers or [tier for tier in TIERS if tier not in ON_DEMAND])
    started = time.monotonic()
    outcomes = run_all(rows, started + 60 * options.minutes)
    print(f"\n{table(outcomes, time.monotonic() - started)}", flush=True)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
