"""The corpus is measured at scale with memory that does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_two_million_passages_in_flat_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.validation", "scale", "2000000"]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(found)
    assert found["bytes_a_row"] < 8, found
    assert found["peak_mib"] < 2048, found
