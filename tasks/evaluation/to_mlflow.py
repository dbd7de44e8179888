"""Tell MLflow of a finished evaluation: its numbers under few names, and each question set as a run of its own. Knows artifacts; plays
nothing.

Numbers that are read first have plain names, which MLflow's pages show first; all others have a prefix: `interval/` for the ends of 95 %
intervals, `detail/` and `stop/` for the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.config import Config, located
from research_rl.config.template_text import template_text
from research_rl.evaluation.methods import find
from research_rl.pipeline.manifest import Manifest
from tasks.tracking.track import StageRun

__all__ = ["FIRST", "Evaluation", "numbers", "track", "track_set"]

FIRST = ("em", "f1", "acc", "reward", "format", "searches", "recall", "tokens")
"""What an evaluation is judged by; the order is that of the tables, MLflow has its own."""
_SHOWN = 12


@dataclass(frozen=True)
class Evaluation:
    """An evaluation artifact and what it measured: a policy under the name of `model`, by its hash, played by a method.

    `judgements` are the folders of judges' verdicts on it; `sample` counts repetitions from 0.
    """

    folder: Path
    artifact: Manifest
    model: str
    policy: str
    method: str = "research"
    judgements: Sequence[Path] = ()
    sample: int = 0


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one group of questions by their names in MLflow; the same names for every evaluation."""
    means: dict[str, dict[str, float]] = {name: value for name, value in metrics.items() if isinstance(value, dict) and "mean" in value}
    named = {name if name in FIRST else f"detail/{name}": value["mean"] for name, value in means.items()}
    ends = {f"interval/{name}_{end}": means[name][end] for name in FIRST if name in means for end in ("low", "high")}
    stops = {f"stop/{name}": value["mean"] for name, value in metrics.get("stop", {}).items()}
    return {**named, **ends, **stops, "detail/questions": float(metrics["n"])}


def track(run: StageRun, config: Config, root: Path, evaluation: Evaluation) -> None:
    """Log an evaluation on `run`, and below it a run a question set, with rows, dataset, prompt and logged model.

    `root` is the workspace's folder.
    """
    metrics: dict[str, Any] = json.loads((evaluation.folder / "metrics.json").read_text(encoding="utf-8"))
    run.metrics(numbers(metrics))
    run.tags({"evaluation": evaluation.model, "method": evaluation.method, "manifest": evaluation.artifact.hash})
    for name in ("metrics.json", "results.jsonl"):
        run.artifact(evaluation.folder / name)
    for name in metrics["by_data_source"]:
        track_set(run, located(config, root), evaluation, name).end("FINISHED")


def track_set(run: StageRun, config: Config, evaluation: Evaluation, name: str, key: str | None = None) -> StageRun:
    """Log a question set of an evaluation, with rows, dataset, prompt and logged model, as a run inside `run`; return it, not yet ended.

    `config` is the one that it was played with, with whole paths. `key` tells it from other evaluations inside `run` whose title is equal.
    """
    metrics: dict[str, Any] = json.loads((evaluation.folder / "metrics.json").read_text(encoding="utf-8"))
    made_of = _made_of(config, evaluation)
    again = f", sample {evaluation.sample + 1}" if evaluation.sample else ""
    # A slash would end the name that MLflow shows.
    title = f"{evaluation.model}: {evaluation.method} on {name}{again}".replace("/", "-")
    one = run.child(title, {"question_set": name, **made_of}, key)
    label = f"{config.profile} {evaluation.model} {evaluation.policy[:_SHOWN]}"
    one.evaluation(
        {
            "folder": str(evaluation.folder),
            "manifest": evaluation.artifact.hash,
            "judgements": [str(folder) for folder in evaluation.judgements],
            "set": name,
            "traces": config.tracking.traces,
            "metrics": numbers(metrics["by_data_source"][name]),
            "prompt": _prompt(config),
            "model": {"name": _plain(label), "params": made_of, "tags": {"policy": evaluation.policy, "method": evaluation.method}},
        }
    )
    return one


def _made_of(config: Config, evaluation: Evaluation) -> dict[str, str]:
    """Return what answers are the work of: another of these is another logged model."""
    parents = {name: value[:_SHOWN] for name, value in evaluation.artifact.parents.items() if name in ("index", "corpus")}
    limits = {f"episode.{name}": str(value) for name, value in config.episode.model_dump(mode="json").items()}
    return {
        "policy": evaluation.policy[:_SHOWN],
        "method": evaluation.method,
        "method_sha256": find(evaluation.method).sha256[:_SHOWN],
        "prompt.template": config.prompt.template,
        "temperature": str(config.evaluation.temperature),
        "published_limits": str(config.evaluation.published_limits),
        "serving.engine": config.serving.engine,
        "serving.dtype": config.serving.dtype,
        **parents,
        **limits,
    }


def _prompt(config: Config) -> dict[str, str]:
    template, path = config.prompt.template, config.prompt.path
    known_as = Path(path).stem if template == "file" and path else template
    # MLflow keeps prompts and models under one set of names, and takes letters, digits and . _ - in those of prompts.
    name = f"research-rl-prompt-{re.sub(r'[^A-Za-z0-9_.-]', '-', known_as)}"
    return {"name": name, "text": template_text(template, path), "message": f"profile {config.profile}"}


def _plain(name: str) -> str:
    """Return a name that MLflow takes for a logged model."""
    return "".join("-" if character in "/:.%\"' " else character for character in name)
