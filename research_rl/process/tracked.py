"""Ask MLflow which artifacts a name stands for, and tell it people's and judges' verdicts.

Starts the commands that know MLflow; imports nothing of them.
"""

from __future__ import annotations

from pathlib import Path

from research_rl.process.checkout_command import answer

__all__ = ["COMMAND", "hashes", "judged", "send_verdicts"]

COMMAND = "tasks.tracking.lookup"
_VERDICTS, _JUDGEMENTS = "tasks.tracking.feedback", "tasks.tracking.judgements"


def hashes(workspace: Path, name: str) -> list[str]:
    """Return the hashes behind mlflow:RUN, registry:NAME/VERSION or registry:NAME@ALIAS, the likeliest first.

    Raises ConfigError for a name that MLflow does not know or where there is no checkout, ServiceError when MLflow does not answer.
    """
    absent = f"{name} is looked up by `python -m {COMMAND}`, which only a checkout has; name a folder or a cell instead"
    return answer(COMMAND, name, ["--workspace", str(workspace), name], absent)


def send_verdicts(workspace: Path) -> int:
    """Let MLflow know the verdicts on the agent's answers that it does not know yet; return how many there were.

    Raises ConfigError where that is refused, such as while a run of the workspace sends its own, ServiceError when MLflow takes none.
    """
    absent = f"verdicts are passed on by `python -m {_VERDICTS}`, which only a checkout has; they stay in the workspace's journal"
    return int(answer(_VERDICTS, "send", ["--workspace", str(workspace)], absent)["verdicts"])


def judged(workspace: Path) -> int:
    """Let MLflow know the judgements of evaluations that it was told of; return how many of them were new.

    Raises ConfigError where that is refused, such as while a run of the workspace sends its own, ServiceError when MLflow takes none.
    """
    absent = f"judgements are passed on by `python -m {_JUDGEMENTS}`, which only a checkout has; they stay in the workspace"
    return int(answer(_JUDGEMENTS, "send", ["--workspace", str(workspace)], absent)["judgements"])
