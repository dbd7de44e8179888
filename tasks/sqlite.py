"""The address of a sqlite file. Knows SQLAlchemy's spelling and what MLflow makes of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

__all__ = ["sqlite_uri"]


def sqlite_uri(path: Path) -> str:
    """Return the address of a sqlite file, whatever characters its path holds.

    SQLAlchemy 2.0 takes a path as it is spelled, up to a question mark; the escapes of a file: address are read by sqlite itself. MLflow
    makes the parent folder of the path as the address spells it: with the slashes escaped too, no folder of that name comes into being.
    """
    text = str(path)
    return f"sqlite:///file:{quote(text, safe='')}?uri=true" if set(text) & set("?%#") else f"sqlite:///{text}"
