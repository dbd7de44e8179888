"""Pass people's verdicts on the agent's answers to MLflow: `python -m tasks.tracking.feedback`. `research serve-agent` calls it.

Invariants: (1) the agent's journal is read from where the last call stopped, and a verdict that comes twice is told once; (2) what MLflow
misses stays in a tracking journal, which the next call, the next run or `python -m tasks.tracking.resend` sends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from research_rl.agent.feedback import JOURNAL, feedback_folder
from research_rl.errors import ResearchError
from research_rl.pipeline import json_lines
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from tasks.tracking.track import FLOW
from tasks.tracking.verdicts import opened, pass_on

__all__ = ["main"]

_PLACE = "told.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Send what is new; print {"verdicts": N} as JSON. Return 0, 1 for what is refused, 3 while MLflow takes nothing."""
    return pass_on(
        "tasks.tracking.feedback", "Pass verdicts on the agent's answers to MLflow.", "verdicts", _journalled, arguments, resends=True
    )


def _journalled(workspace: Workspace) -> int:
    """Write the verdicts that are new into a tracking journal of their own; return how many they are."""
    folder = feedback_folder(workspace)
    place = folder / _PLACE
    offset = int(read_object(place, ResearchError, "remove it").get("offset", 0)) if place.is_file() else 0
    new = json_lines.read(folder / JOURNAL, offset)
    if new:
        journal = opened(workspace, "verdicts", "verdicts on answers", {"flow": "research-serve"}, {})
        for _, line in new:
            journal.write("verdict", key=FLOW, answer=str(line["id"]), verdict=_verdict(line), record=_record(line))
        journal.write("close", status="FINISHED")
        # Behind the journal: a call that is killed before writes the verdicts again, and the sender knows them.
        write_private(place, json.dumps({"offset": new[-1][0]}))
    return len(new)


def _verdict(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line.get(name) for name in ("verdict", "comment", "answer", "time", "version")}


def _record(line: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the episode as a trace's record; None for a later verdict on the same answer."""
    episode = line.get("episode")
    return {**episode, "question": line["question"], "prediction": line.get("given_answer")} if episode else None


if __name__ == "__main__":
    raise SystemExit(main())
