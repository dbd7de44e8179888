"""Tasks train and export: GRPO watched step by step, then the trained policy as a Hugging Face folder, registered with its lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.events import emit_event
from prefect.runtime import flow_run

from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Context
from research_rl.report.training import SERIES
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.rollouts import read_rollouts
from research_rl.training.run.watch import Finding
from research_rl.training.train import TrainHooks, run_with
from tasks.artifacts import watch_note
from tasks.job import Job
from tasks.stage import stage_task
from tasks.tracking.registry import MANIFEST
from tasks.tracking.track import StageRun

__all__ = ["Watcher", "export", "train"]

_FIRST = {**SERIES, "seconds_per_step": "timing_s/step"}


class Watcher(TrainHooks):
    """Passes the trainer's steps, episodes, checkpoints and attempts on to tracking; `traces` episodes of each step become traces."""

    def __init__(self, run: StageRun, traces: int = 0) -> None:
        self.run, self.traces = run, traces
        self.attempts: dict[int, StageRun] = {}

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step's metrics under verl's names, and those that are read first under plain ones, which MLflow shows first."""
        first = {name: metrics[metric] for name, metric in _FIRST.items() if metric in metrics}
        self.run.metrics({**metrics, **first}, step)

    def on_rollouts(self, step: int, path: Path) -> None:
        """Upload a step's episodes, those on dev too, and show some of them as traces."""
        for file in (path, path.parent / "dev" / path.name):
            if file.is_file():
                self.run.artifact(file, "/".join(("rollouts", *file.relative_to(path.parent).parts[:-1])))
        if path.is_file() and self.traces:
            self.run.traces(sampled(list(read_rollouts({step: path})), self.traces))

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Note the newest whole checkpoint."""
        self.run.tags({"checkpoint_step": str(step)})

    def on_finding(self, finding: Finding, last_good: Checkpoint | None) -> None:
        """Show why the watch warned or stopped, and say it in tags."""
        tags = {f"watch.{finding.rule}": f"step {finding.step}: {finding.text}"}
        if finding.stops:
            tags |= {"collapse": f"step {finding.step}: {finding.text}", "collapse.good_step": str(last_good.step) if last_good else "none"}
        self.run.tags(tags)
        watch_note(finding, last_good)
        if finding.stops:
            _raise_event(finding, last_good)

    def on_attempt(self, number: int, resume: int) -> None:
        """Open a nested run for a start of the trainer."""
        self.attempts[number] = self.run.child(f"attempt-{number}", {"resumed_from_step": str(resume)})
        self.attempts[number].begin()

    def on_attempt_end(self, number: int, why: str | None) -> None:
        """End its run: a start that did not finish says why."""
        if why:
            self.attempts[number].tags({"ended": why})
        self.attempts[number].end("FAILED" if why else "FINISHED")


def _raise_event(finding: Finding, last_good: Checkpoint | None) -> None:
    emit_event(
        "research.training.collapsed",
        resource={"prefect.resource.id": f"research.training.{flow_run.id or 'none'}"},
        payload={"rule": finding.rule, "step": finding.step, "text": finding.text, "good_step": last_good.step if last_good else None},
    )


def sampled(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return `count` episodes of a step as trace records, spread from the lowest reward to the highest."""
    # From worst to best: a random choice of two would often show two alike.
    ranked = sorted((row for row in rows if "segments" in row), key=lambda row: float(row["score"]))
    chosen = [ranked[round(place * (len(ranked) - 1) / max(1, count - 1))] for place in range(min(count, len(ranked)))]
    return [{**row, "golden_answers": row["golds"], "scores": _scores(row)} for row in chosen]


def _scores(row: dict[str, Any]) -> dict[str, float]:
    return {"step": row["step"], "reward": float(row["score"]), "f1": float(row["f1"]), "searches": float(len(row["searches"]))}


def build(context: Context, run: StageRun) -> None:
    """Train and tell tracking of every step."""
    run_with(context, Watcher(run, context.config.tracking.traces_per_step))


def registered(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Make the exported policy a version in the registry; its tags are its lineage."""
    if (model := job.config.tracking.registered_model) and run.fresh:
        lineage = {f"parent.{name}": value for name, value in artifact.parents.items()}
        counts = {name: str(value) for name, value in artifact.counts.items()}
        run.register(job.workspace.folder("export"), model, {MANIFEST: artifact.hash, "profile": job.config.profile, **lineage, **counts})


train = stage_task("train", build=build, heavy=True)
export = stage_task("export", after=registered)
