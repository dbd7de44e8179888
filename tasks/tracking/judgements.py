"""Pass judges' verdicts on evaluations to MLflow: `python -m tasks.tracking.judgements`. `research judge` calls it.

Invariants: (1) an evaluation that MLflow was not told of is passed over: it takes its judgements with it when it is; (2) a judgement is
told once, and once more when it holds new verdicts; (3) what MLflow misses stays in a tracking journal, which the next call, the next run
or `python -m tasks.tracking.resend` sends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from research_rl.errors import ResearchError
from research_rl.evaluation import judging
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from tasks.tracking.track import FLOW, journals, reported
from tasks.tracking.verdicts import opened, pass_on

__all__ = ["main"]

_TOLD = "judged.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Send what is new; print {"judgements": N} as JSON. Return 0, 1 for what is refused, 3 while MLflow takes nothing."""
    return pass_on(
        "tasks.tracking.judgements", "Pass judges' verdicts on evaluations to MLflow.", "judgements", _journalled, arguments, resends=False
    )


def _journalled(workspace: Workspace) -> int:
    """Write a tracking journal for each judgement that is new; return how many there are."""
    place, known = journals(workspace) / _TOLD, reported(journals(workspace))
    sent = read_object(place, ResearchError, "remove it") if place.is_file() else {}
    number = 0
    for folder, artifact in judging.standing(workspace.root):
        [(stage, evaluation)] = artifact.parents.items()
        journal = known.get(f"{stage}:{evaluation}")
        if journal is None or sent.get(folder.name) == artifact.hash:
            continue
        _write(workspace, folder, artifact, evaluation, journal)
        sent[folder.name] = artifact.hash
        # Behind the journal: a call that is killed before writes the judgement again, and the sender knows its verdicts.
        write_private(place, json.dumps(sent))
        number += 1
    return number


def _write(workspace: Workspace, folder: Path, artifact: Manifest, evaluation: str, evaluation_journal: str) -> None:
    preset, model = (str(artifact.parameters[name]) for name in ("preset", "model"))
    tags = {"flow": "research-judge", "evaluation_manifest": evaluation}
    params = {"preset": preset, "model": model, "folder": folder.name}
    journal = opened(workspace, "judgement", f"judge {preset} {model}", tags, params)
    metrics = read_object(folder / judging.METRICS, ResearchError, "judge again")
    rates = {f"judge/{name}": float(metrics[name]["mean"]) for name in ("accuracy", "published_accuracy", "em")}
    journal.write("metrics", key=FLOW, step=0, values={**rates, "judge/questions": metrics["n"], "judge/failed": metrics["failed"]})
    journal.write("judged", key=FLOW, judgement=str(folder), evaluation=evaluation, told=evaluation_journal)
    journal.write("close", status="FINISHED")


if __name__ == "__main__":
    raise SystemExit(main())
