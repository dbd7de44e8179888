"""The tracking journal: one JSON line an event, on disk before anything is sent. Knows files only.

Invariants: (1) an event is on the disk when `write` returns True; (2) a line cut by a crash or a full disk is never read, and spoils
no other; (3) the sender's place is kept beside the journal, so that sending goes on where it stopped; (4) no event holds credentials.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from research_rl.config.redact import redact_tree
from research_rl.pipeline import json_lines

__all__ = ["EVENTS", "Place", "TrackingJournal", "read"]

EVENTS = "events.jsonl"
PLACE = "sent.json"
_FIELDS = {
    "open": {"name", "experiment", "artifacts", "uri", "tags", "params"},
    "begin": {"key", "parent", "name", "start", "params"},
    "metrics": {"key", "step", "values"},
    "tags": {"key", "values"},
    "artifact": {"key", "path", "folder"},
    "trace": {"key", "record"},
    "verdict": {"key", "answer", "verdict", "record"},
    "evaluation": {"key", "evaluation"},
    "judged": {"key", "judgement", "evaluation", "told"},
    "register": {"key", "path", "model", "tags"},
    "describe": {"key", "model", "manifest", "text", "tags"},
    "standing": {"key", "model"},
    "promote": {"key", "model", "manifest", "met", "who", "when", "why"},
    "end": {"key", "status"},
    "close": {"status"},
}
"""What each kind of event must say, beside `op` and `time`."""
logger = logging.getLogger("prefect.tasks.track")


class TrackingJournal:
    """Appends events to `folder/events.jsonl`; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lost = 0
        """Events that the disk did not take."""
        self._lock = threading.Lock()

    def write(self, operation: str, **values: Any) -> bool:
        """Append one event with the present time; return whether the disk took it.

        A disk that does not take it costs the run this event, not more: the first one is said in the log.
        """
        # Here, at the one place that all events pass.
        event = redact_tree({"op": operation, "time": int(time.time() * 1000), **values})
        with self._lock:
            try:
                # On disk before it returns: a run that is killed the next moment is still known to MLflow with what it did.
                json_lines.append(self.folder / EVENTS, event, sync=True)
            except OSError as error:
                self.lost += 1
                if self.lost == 1:
                    logger.error("%s takes no tracking event: %s; free disk space, the run goes on without it", self.folder, error.strerror)
                return False
        return True


@dataclass
class Place:
    """How far a journal was sent, and under which ids; `refused` counts events that MLflow did not accept.

    `failure` says why sending stopped, empty while it does not. `standing` is what the registry answered to the event of that name:
    version and manifest of the champion, empty where there is none, None before it answered. `traces` names those that were begun
    for the events after `offset`, of which MLflow may have a part. `doubted` says that an earlier place was lost, so that any event
    may have been sent before.
    """

    offset: int = 0
    uri: str = ""
    experiment: str = ""
    runs: dict[str, str] = field(default_factory=dict[str, str])
    done: bool = False
    refused: int = 0
    failure: str = ""
    standing: dict[str, str] | None = None
    traces: list[str] = field(default_factory=list[str])
    doubted: bool = False

    @classmethod
    def load(cls, folder: Path) -> Place:
        """Return the place kept in `folder`; a fresh one when there is none, or when it cannot be read."""
        path = folder / PLACE
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            # Sending from the start is safe: runs and traces are known again by their tags, equal metrics are stored once.
            logger.warning("%s cannot be read (%s); the journal is sent from its start", path, error)
            return cls(doubted=True)

    def save(self, folder: Path) -> None:
        """Keep the place in `folder`, in one step."""
        temporary = folder / f"{PLACE}.tmp"
        temporary.write_text(json.dumps(redact_tree(asdict(self))), encoding="utf-8")
        temporary.replace(folder / PLACE)


def read(folder: Path, offset: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the events from byte `offset` on, each with the offset behind it; a line that is no event is logged and passed over."""
    events: list[tuple[int, Mapping[str, Any]]] = []
    for end, record in json_lines.read(folder / EVENTS, offset):
        if _is_event(record):
            events.append((end, record))
        else:
            logger.warning("%s: the line that ends at byte %d is no event of this version and is passed over", folder / EVENTS, end)
    return events


def _is_event(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    event = cast(dict[str, Any], record)
    return isinstance(event.get("time"), int) and _FIELDS.get(str(event.get("op")), {"?"}) <= event.keys()
