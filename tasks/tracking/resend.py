"""Send the tracking events that earlier runs of a workspace could not. Run as `python -m tasks.tracking.resend`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from research_rl.pipeline.lock import locked
from research_rl.pipeline.stages import Workspace
from tasks.tracking.sender import send_all
from tasks.tracking.track import journals

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Send the journals that MLflow missed; return the exit code."""
    parser = argparse.ArgumentParser("tasks.tracking.resend", description="Send tracking journals that MLflow missed.")
    parser.add_argument("-w", "--workspace", type=Path, default=Path())
    workspace = Workspace(parser.parse_args(arguments).workspace.resolve())
    # Two senders of one journal would send its events twice.
    with locked(workspace, 0.0, "sending tracking journals"):
        return send_all(journals(workspace), live=None)


if __name__ == "__main__":
    raise SystemExit(main())
