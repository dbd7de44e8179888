"""The tracking journal: one JSON line an event, on disk before anything is sent. Knows files only.

Invariants: (1) an event is on disk when `write` returns; (2) a line cut by a crash is never read; (3) the sender's place
is kept beside the journal, so that sending goes on where it stopped.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["EVENTS", "Journal", "Place", "read"]

EVENTS = "events.jsonl"
PLACE = "sent.json"


class Journal:
    """Appends events to `folder/events.jsonl`; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._stream = (folder / EVENTS).open("ab", buffering=0)
        self._lock = threading.Lock()

    def write(self, operation: str, **values: Any) -> None:
        """Append one event with the present time."""
        line = json.dumps({"op": operation, "time": int(time.time() * 1000), **values}, ensure_ascii=False, default=str)
        with self._lock:
            self._stream.write(line.encode() + b"\n")


@dataclass
class Place:
    """How far a journal was sent, and under which ids."""

    offset: int = 0
    uri: str = ""
    experiment: str = ""
    runs: dict[str, str] = field(default_factory=dict[str, str])
    done: bool = False

    @classmethod
    def load(cls, folder: Path) -> Place:
        """Return the place kept in `folder`, a fresh one when there is none."""
        path = folder / PLACE
        return cls(**json.loads(path.read_text())) if path.is_file() else cls()

    def save(self, folder: Path) -> None:
        """Keep the place in `folder`, in one step."""
        temporary = folder / f"{PLACE}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(folder / PLACE)


def read(folder: Path, offset: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the whole lines from byte `offset` on, each with the offset behind it."""
    path = folder / EVENTS
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(offset)
        block = stream.read()
    events: list[tuple[int, Mapping[str, Any]]] = []
    for line in block.split(b"\n")[:-1]:
        offset += len(line) + 1
        events.append((offset, json.loads(line)))
    return events
