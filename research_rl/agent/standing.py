"""What a service answers with, as it tells operators at /info and /metrics. Knows numbers and names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Failure", "Standing"]

_CHARS = 300


@dataclass(frozen=True)
class Failure:
    """Something that failed: what it was about, why, and when (seconds since 1970)."""

    what: str
    reason: str
    when: float

    @classmethod
    def now(cls, what: str, error: Exception) -> Failure:
        """Return a failure of this moment; of a message of several lines the first one, shortened."""
        return cls(what, str(error).partition("\n")[0][:_CHARS], time.time())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"what": self.what, "reason": self.reason, "when": round(self.when, 3)}


@dataclass(frozen=True)
class Standing:
    """The model in service since `since` (seconds since 1970): its served name, and how a person names it.

    `follows` is the alias that is followed. `failed` is the last switch that failed, `registry` why the registry does not answer, None
    while it does.
    """

    model: str
    version: str
    since: float
    follows: str | None = None
    switches: int = 0
    failed_switches: int = 0
    failed: Failure | None = None
    registry_failures: int = 0
    registry: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        record: dict[str, Any] = {"model": self.model, "version": self.version, "since": round(self.since, 3)}
        if self.follows:
            failed, registry = (each.to_json() if each else None for each in (self.failed, self.registry))
            record |= {"follows": self.follows, "switches": self.switches, "failed_switches": self.failed_switches}
            record |= {"last_failed_switch": failed, "registry_trouble": registry}
        return record
