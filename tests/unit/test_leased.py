"""A command that is ended with its lease: what it wrote last is in the log."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from research_rl.process import services

LEASED = Path(services.__file__).with_name("_leased.py")
FIRST = 70_000
"""More than a pipe holds: the copying thread then waits for whoever reads standard output."""
COMMAND = f"""
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
sys.stdout.write("x" * {FIRST})
sys.stdout.flush()
try:
    signal.pause()
finally:
    print("the last line", flush=True)
    pathlib.Path("ended").touch()
"""


@pytest.mark.parametrize(("told", "code"), [(True, 143), (False, 75)], ids=["told to end", "lease expired"])
def test_the_last_line_is_in_the_log(told: bool, code: int, tmp_path: Path) -> None:
    lease, log = tmp_path / "lease", tmp_path / "log"
    command = [sys.executable, "-I", "-S", str(LEASED), str(lease), "60" if told else "2", str(log), str(tmp_path)]
    process = subprocess.Popen([*command, sys.executable, "-c", COMMAND], stdout=subprocess.PIPE)
    try:
        while not log.is_file() or log.stat().st_size < FIRST:
            lease.write_text(str(time.monotonic()))
            time.sleep(0.1)
        if told:
            process.terminate()
        while not (tmp_path / "ended").is_file():
            time.sleep(0.1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert b"the last line" in output and "the last line" in log.read_text()
