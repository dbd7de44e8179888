"""JSON of files that others wrote: read in bounded memory, or refused with one message. Knows no field.

Python raises RecursionError, and not ValueError, for brackets nested too deeply; nobody who reads a file expects that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from research_rl.errors import ResearchError

__all__ = ["parse", "read_object"]

_MOST_BYTES = 256 << 20
"""The largest tokenizer.json of a published model has 33 MB."""


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for whatever is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, error: type[ResearchError], remedy: str) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `error`, with the reason and the remedy, when it holds none."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        value = parse(raw)
    except OSError as failure:
        raise error(f"{path} cannot be read ({failure.strerror}); {remedy}") from None
    except ValueError as failure:  # also a text that is not UTF-8
        raise error(f"{path} is not JSON ({failure!s:.200}); {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, not an object; {remedy}")
    return cast(dict[str, Any], value)
