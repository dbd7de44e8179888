"""Run the checks tier by tier, each with its time; stop at the first that fails.

Usage: tests/run.py [lint|unit|contract|fault|flow|long ...]   (all but long when none is named)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / ".venv/bin/python")
BIN = ROOT / ".venv/bin"
TIERS: dict[str, list[list[str]]] = {
    "lint": [
        [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
        [str(BIN / "ruff"), "check", "--quiet", "."],
        [str(BIN / "pyright"), "--warnings"],
        [str(BIN / "lint-imports"), "--no-cache"],
    ],
    "unit": [[PYTHON, "-m", "pytest", "tests/unit"]],
    "contract": [[PYTHON, "-m", "pytest", "tests/contract"]],
    "fault": [[PYTHON, "-m", "pytest", "tests/fault"]],
    "flow": [[PYTHON, "-m", "pytest", "tests/flow"]],
    "long": [[PYTHON, "-m", "pytest", "-m", "long", "tests"]],
}


def main(names: list[str]) -> int:
    """Run the named tiers and print their times."""
    times: dict[str, float] = {}
    for name in names or [name for name in TIERS if name == "lint" or any((ROOT / "tests" / name).glob("test_*.py"))]:
        started = time.monotonic()
        for command in TIERS[name]:
            code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}).returncode
            if code:
                print(f"{name}: `{' '.join(command)}` failed with code {code}")
                return code
        times[name] = time.monotonic() - started
        print(f"{name}: ok in {times[name]:.0f} s", flush=True)
    print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()), f"; in all {sum(times.values()):.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
