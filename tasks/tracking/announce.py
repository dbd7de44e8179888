"""Show and tell in Prefect that a person moved the champion, as a run shows what its gate did. Knows Prefect's HTTP interface only.

Invariant: a move that is made stays made, whether or not a server answers; none is started for this.
"""

from __future__ import annotations

import os
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

import httpx

from research_rl.config.redact import redact
from research_rl.process import proxies
from research_rl.report import markdown
from research_rl.terminal import say
from tasks import settings
from tasks.tracking.registry import Move

__all__ = ["ARTIFACT", "EVENT", "announce"]

ARTIFACT, EVENT = "champion-moved", "research.champion.moved"
_WAIT_S = 10.0


def announce(model: str, made: Move) -> bool:
    """Write an artifact and raise an event about a move; return whether Prefect took both. A failure is a line of standard error."""
    server = _server()
    if server is None:
        return False
    url, headers, auth = server
    try:
        with httpx.Client(base_url=url, headers=headers, auth=auth, timeout=_WAIT_S, **proxies.environment_options()) as client:
            client.post("/artifacts/", json=_artifact(model, made)).raise_for_status()
            client.post("/events", json=[_event(model, made)]).raise_for_status()
    except httpx.HTTPError as error:
        say(redact(f"Prefect at {url} was not told that the champion moved: {error!s:.200}"), sys.stderr)
        return False
    return True


def _server() -> tuple[str, dict[str, str], tuple[str, str] | None] | None:
    """Return address, headers and login of the server that is configured, else of `make up` where it runs; None where there is none."""
    ours = settings.running().get("PREFECT_API_URL")
    if not (url := os.environ.get("PREFECT_API_URL") or ours):
        return None
    key, login = os.environ.get("PREFECT_API_KEY"), os.environ.get("PREFECT_API_AUTH_STRING")
    # A server of somebody else's gets no key of ours.
    if not login and url == ours:
        login = settings.keys()["PREFECT_API_AUTH_STRING"]
    user, _, secret = (login or "").partition(":")
    return url, {"Authorization": f"Bearer {key}"} if key else {}, (user, secret) if login else None


def _artifact(model: str, made: Move) -> dict[str, Any]:
    reason = made.reason
    rows = [("model", model), ("now", f"version {made.after}"), ("before", f"version {made.before}" if made.before else "none")]
    rows += [("moved by", reason.by), ("who", reason.who), ("why", reason.why), ("when", reason.when)]
    text = f"# The champion was moved by hand\n\n{markdown.table(('', ''), rows)}"
    return {"key": ARTIFACT, "type": "markdown", "data": text, "description": f"version {made.after}: {reason.why}"}


def _event(model: str, made: Move) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": EVENT,
        "resource": {"prefect.resource.id": f"research.model.{model}", "research.champion.by": made.reason.by},
        "payload": {"before": made.before, "after": made.after, "who": made.reason.who, "why": made.reason.why},
    }
