"""The commands of the pages under docs/ run as printed, in an empty folder, with the environment's folder first on PATH."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from research_rl.paths import CHECKOUT

PAGES = sorted((CHECKOUT / "docs").glob("*.md"))
RUN = re.compile(r"<!-- run -->\n```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [pytest.param(block, id=page.stem) for page in PAGES for block in RUN.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS)
def test_the_commands_of_a_page_run_as_printed(block: str, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{CHECKOUT / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_pages_with_commands_to_run_are_found() -> None:
    assert {str(block.id) for block in BLOCKS} >= {"own-questions", "own-corpus"}
