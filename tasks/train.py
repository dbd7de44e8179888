"""Tasks train and export: GRPO watched step by step, then the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from research_rl.stages import Context
from research_rl.training.checkpoints import Checkpoint
from research_rl.training.train import TrainHooks, run_with
from research_rl.training.watch import Finding
from tasks.artifacts import watch_note
from tasks.stage import stage_task
from tasks.track import StageRun

__all__ = ["Watcher", "export", "train"]


class Watcher(TrainHooks):
    """Passes the trainer's steps, episodes and checkpoints on to tracking."""

    def __init__(self, run: StageRun) -> None:
        self.run = run

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step's metrics under verl's names."""
        self.run.metrics(metrics, step)

    def on_rollouts(self, step: int, path: Path) -> None:
        """Upload a step's episodes."""
        if path.is_file():
            self.run.artifact(path, "rollouts")

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Note the newest whole checkpoint."""
        self.run.tags({"checkpoint_step": str(step)})

    def on_finding(self, finding: Finding, kept: Checkpoint | None) -> None:
        """Show why the watch warned or stopped, and say it in tags."""
        tags = {f"watch.{finding.rule}": f"step {finding.step}: {finding.text}"}
        if finding.stops:
            tags |= {"collapse": f"step {finding.step}: {finding.text}", "collapse.good_step": str(kept.step) if kept else "none"}
        self.run.tags(tags)
        watch_note(finding, kept)


def build(context: Context, run: StageRun) -> None:
    """Train and tell tracking of every step."""
    run_with(context, Watcher(run))


train = stage_task("train", build=build)
export = stage_task("export")
