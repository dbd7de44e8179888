"""The address of a sqlite file. Knows SQLAlchemy's spelling and what MLflow makes of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

__all__ = ["sqlite_uri"]


def sqlite_uri(path: Path) -> str:
    """Return the address of a sqlite file, whatever characters its path holds.

    MLflow makes the parent folder of the path as the address spells it. Where characters have to be escaped, the slashes are too, so
    that no folder of the escaped name comes into being.
    """
    text = str(path)
    return f"sqlite:///{quote(text, safe='') if set(text) & set('?%#') else text}"
