"""Which code runs: the version of the package and, in a checkout, the commit."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from research_rl.paths import CHECKOUT

__all__ = ["Commit", "commit"]


@dataclass(frozen=True)
class Commit:
    """A commit of the checkout; `changed` tells whether tracked files differ from it."""

    hash: str
    changed: bool


def commit() -> Commit | None:
    """Return the commit of the checkout; None where the package is installed without one, or git is absent."""
    if not (CHECKOUT / ".git").exists():  # an installed package may lie inside another project's repository
        return None
    try:
        return Commit(_git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno")))
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
