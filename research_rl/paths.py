"""Where this project's own files lie: in a checkout, or beside an installed wheel. Knows no workspace."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CHECKOUT", "PROFILES", "cache_folder"]

CHECKOUT = Path(__file__).resolve().parent.parent
"""The folder that holds the package: the checkout, or site-packages. It is what a subprocess needs on its PYTHONPATH."""
PROFILES = CHECKOUT / "configs"


def cache_folder() -> Path:
    """Return the folder of downloaded models: $RESEARCH_CACHE, else `.cache` of the checkout."""
    return Path(os.environ.get("RESEARCH_CACHE") or CHECKOUT / ".cache")
