"""`python -m tasks.local.sbom`: a CycloneDX list of the parts of each environment, from its lock. Installs and asks nothing.

Invariant: a file stands whole or not at all, and the same locks give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from research_rl.errors import ConfigError, ResearchError
from research_rl.paths import CHECKOUT, PYTHON
from research_rl.terminal import say

__all__ = ["main", "parts", "write"]

LOCKS = CHECKOUT / "requirements"
FOLDER = CHECKOUT / "dist" / "sbom"


def parts(lock: Path) -> str:
    """Return the requirements of a lock, with torch's where set-up installs it beside the lock."""
    settings = runpy.run_path(str(LOCKS / "install.py"))
    beside = lock.stem in settings["FOLDERS"] and lock.stem not in settings["WITHOUT_TORCH"]
    return lock.read_text() + (f"{settings['TORCH']}\n" if beside else "")


def write(lock: Path, folder: Path = FOLDER) -> Path:
    """Write `folder`/<lock>.cdx.json, in CycloneDX 1.6, and return its path. Raises ConfigError when the tool refuses the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{lock.stem}.cdx.json"
    staged = target.with_suffix(".part")
    options = ["--pyproject", str(CHECKOUT / "pyproject.toml"), "--spec-version", "1.6", "--output-reproducible", "--validate"]
    command = [PYTHON, "-W", "ignore", "-m", "cyclonedx_py", "requirements", *options, "--output-file", str(staged), "-"]
    done = subprocess.run(command, input=(text := parts(lock)), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(f"{lock.name} has no list of parts: {said[0]}; run `make setup`, which installs cyclonedx-bom")
    # The tool leaves out a line that it cannot read.
    listed = {(part["name"], part.get("version")) for part in json.loads(staged.read_text())["components"]}
    for line in text.splitlines():
        if line and not line.startswith("#") and tuple(re.split(r"\[.*\]==|==|;", line)[:2]) not in listed:
            raise ConfigError(f"{lock.name} has no list of parts: its line {line!r} is no NAME==VERSION; correct it")
    os.replace(staged, target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the list of every lock, or of the named ones; return the exit code."""
    names = sorted(path.stem for path in LOCKS.glob("*.txt"))
    parser = argparse.ArgumentParser("tasks.local.sbom", description="A CycloneDX list of the parts of each environment.")
    parser.add_argument("locks", nargs="*", metavar="lock", help=f"of {', '.join(names)}; all when none is named")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: dist/sbom)")
    options = parser.parse_args(arguments)
    try:
        for name in options.locks or names:
            if name not in names:
                raise ConfigError(f"lock {name!r} is not one of {', '.join(names)}")
            say(write(LOCKS / f"{name}.txt", options.folder))
    except ResearchError as error:
        say(f"sbom: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
