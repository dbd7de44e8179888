"""What the commands share that pass verdicts on to MLflow, those of people and those of judges. Knows journals; knows no verdict."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from research_rl import config
from research_rl.config.redact import redact
from research_rl.errors import ResearchError
from research_rl.pipeline.lock import locked
from research_rl.pipeline.stages import Workspace
from research_rl.terminal import say, say_json
from tasks.tracking.journal import TrackingJournal
from tasks.tracking.sender import send_all
from tasks.tracking.track import journals, tracking_uri

__all__ = ["opened", "pass_on"]

_FAILED = 3


def opened(workspace: Workspace, kind: str, name: str, tags: Mapping[str, str], params: Mapping[str, str]) -> TrackingJournal:
    """Begin a tracking journal for a run of its own in the workspace's experiment; `kind` ends the journal's name."""
    resolved = config.load(workspace.root / "params.yaml")
    journal = TrackingJournal(journals(workspace) / f"{time.time_ns()}-{kind}")
    journal.write(
        "open",
        name=name,
        experiment=resolved.tracking.experiment,
        uri=redact(tracking_uri(resolved, workspace)),
        artifacts=str(workspace.root / "mlartifacts"),
        tags=dict(tags),
        params=dict(params),
    )
    return journal


def pass_on(
    command: str, about: str, counted: str, journalled: Callable[[Workspace], int], arguments: Sequence[str] | None, *, resends: bool
) -> int:
    """Have what is new journalled, send it, and print {`counted`: N} as JSON.

    Returns 0, 1 for what is refused, 3 while MLflow takes nothing. What an earlier call left is sent, too: with `resends` always, else
    where there is something new.
    """
    parser = argparse.ArgumentParser(command, description=about)
    parser.add_argument("-w", "--workspace", type=Path, default=Path(), help="folder with params.yaml")
    workspace = Workspace(parser.parse_args(arguments).workspace.resolve())
    left = 0
    try:
        if (number := journalled(workspace)) or resends:
            journals(workspace).mkdir(parents=True, exist_ok=True)
            # Two senders of one journal would send its events twice.
            with locked(workspace, 0.0, "sending tracking journals"):
                left = send_all(journals(workspace), live=None)
    except ResearchError as error:
        say(redact(str(error)), sys.stderr)
        return 1
    if left:
        say("MLflow takes no verdicts now; set MLFLOW_TRACKING_URI or tracking.mlflow_uri to a server that answers", sys.stderr)
        return _FAILED
    say_json({counted: number})
    return 0
