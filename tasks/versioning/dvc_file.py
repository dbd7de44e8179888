"""Render dvc.yaml from the stage table, so that DVC and the flows share one definition of every stage.

`download` is absent: its artifact is the snapshot that data.dvc versions as a whole. `python -m tasks.versioning.dvc_file` writes
the checkout's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES, Stage
from research_rl.report.files import CURVES, HEADLINE
from research_rl.terminal import say

__all__ = ["SNAPSHOT", "render", "write"]

SNAPSHOT = "download"
_HEADER = "# Written by `python -m tasks.versioning.dvc_file` from the stage table in research_rl/pipeline/stages.py.\n"
# Stages that read their last artifact: DVC must not remove it before they run.
_PERSISTENT = {"validate"}
_PLOTS = {
    "reward": ["reward"],
    "F1 while training": ["f1"],
    "searches per question": ["searches"],
    "tokens per response": ["tokens"],
}
# A checkout's own environment comes first; elsewhere the caller's PATH decides.
_COMMAND = "PATH=.venv/bin:$PATH python -m research_rl run {name}"


def render() -> str:
    """Return the text of dvc.yaml."""
    stages = {stage.name: _stage(stage) for stage in STAGES.values() if stage.name != SNAPSHOT}
    return _HEADER + yaml.safe_dump({"stages": stages, "metrics": _metrics(), "plots": _plots()}, sort_keys=False, width=120)


def _metrics() -> list[str]:
    """Return the files of `dvc metrics`: small ones inside the artifacts, which DVC allows outside the stages only."""
    return [f"{STAGES['report'].folder}/{HEADLINE}"]


def _plots() -> list[dict[str, Any]]:
    """Return the plots of `dvc plots`: the training curves over the step."""
    curves = f"{STAGES['report'].folder}/{CURVES}"
    return [{title: {"x": "step", "y": {curves: columns}, "title": title}} for title, columns in _PLOTS.items()]


def _stage(stage: Stage) -> dict[str, Any]:
    entry: dict[str, Any] = {"desc": stage.summary, "cmd": _COMMAND.format(name=stage.name)}
    if stage.parents:
        entry["deps"] = [STAGES[parent].folder for parent in stage.parents]
    # Keys, not sections: an empty seed stands for the top-level one, which DVC has to watch, too.
    if stage.keys:
        entry["params"] = list(stage.keys)
    entry["outs"] = [{stage.folder: {"persist": True}} if stage.name in _PERSISTENT else stage.folder]
    return entry


def write(folder: Path) -> bool:
    """Write `folder`/dvc.yaml; return False when it already says the same."""
    path, text = folder / "dvc.yaml", render()
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    say("dvc.yaml written" if write(CHECKOUT) else "dvc.yaml is current")
