"""The records of a run, step by step: metrics, episodes, losses, and the last good checkpoint. Knows files; starts no process."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.episode.trajectory import SearchFault, StopReason
from research_rl.errors import TrainingError
from research_rl.pipeline.stages import Progress
from research_rl.training.run import checkpoints, episodes, watch
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.metrics_log import MetricsLog, Tail, numbers, parsed
from research_rl.training.run.remote import Uploader
from research_rl.training.run.run import Run, TrainHooks
from research_rl.training.run.watch import Finding

__all__ = ["Records"]

MAX_LOST = 0.1
"""Largest share of a step's trajectories that may be missing before training on the rest is refused."""
MAX_FAILED_SEARCHES = 0.5
"""Largest share of a step's searches that may bring no passage before the retriever counts as lost."""
# verl has no metric for it, only this line of its log.
_PADDED = re.compile(r"Upsampled batch from (\d+) to (\d+) with (\d+) synthetic padding samples")


@dataclass
class Records:
    """What is known of a run over all its attempts."""

    run: Run
    hooks: TrainHooks
    progress: Progress
    log: MetricsLog
    lost: int = 0
    padding: int = 0
    uploader: Uploader | None = None

    def attempts(self) -> int:
        """Return how often the trainer was started for this run, earlier processes included."""
        return len(list(self.run.logs.glob("attempt_*.log")))

    def replay(self) -> None:
        """Tell the hooks of the steps an earlier process finished and this one keeps."""
        newest = checkpoints.latest(self.run.paths.checkpoints, self.run.config.train.steps)
        for step in sorted(self.log.rows):
            if newest and step <= newest.step:
                self._hook(step)
        if newest:
            self.say(f"step {newest.step} of {self.run.config.train.steps} stands from an earlier start")

    def rewind(self) -> Checkpoint | None:
        """Return the checkpoint to go on from, after forgetting the unfinished steps later than it.

        When it is of the last step wanted, nothing is forgotten: a longer run of which it is a part stays as it is. Raises
        TrainingError when such a run has no checkpoint of that step, because training to it would discard what it has.
        """
        # First: the checkpoint that was kept aside may be the newest whole one.
        watch.restore(self.run.paths.checkpoints, self.run.paths.work)
        newest = self._with_metrics(
            checkpoints.latest(self.run.paths.checkpoints, self.run.config.train.steps, verify=True, passed_over=self._passed_over)
        )
        step = newest.step if newest else 0
        if newest:
            checkpoints.seal(newest.path)
        if step < self.run.config.train.steps:
            self._forget_after(step)
        for missing in self.log.missing(step):
            # Where more than one step would be done again, the episodes are the only witness of a step that was saved but not logged.
            self.finish(missing, self._logged(missing))
        return newest

    def _forget_after(self, step: int) -> None:
        """Remove what is left of steps after `step`, which are about to be done again, and say which. Raises TrainingError."""
        target, whole = self.run.config.train.steps, [checkpoint.step for checkpoint in checkpoints.complete(self.run.paths.checkpoints)]
        if whole and whole[-1] > target:
            raise TrainingError(
                f"train.steps={target}: this run was trained to step {whole[-1]} and has no checkpoint of step {target}, only of "
                f"{', '.join(map(str, whole))}; set train.steps to one of them to publish it, to more than {whole[-1]} to train on, or "
                f"force the stage to train anew (`research run train --force` keeps the earlier run beside the new one)"
            )
        if self.log.last > step:
            self.say(f"steps {step + 1} to {self.log.last} have no whole checkpoint and are done again")
        checkpoints.discard_after(self.run.paths.checkpoints, step)
        episodes.discard_after(self.run.paths.episodes, step)
        for path in self.run.rollouts.rglob("*.jsonl.gz"):
            if int(path.name.split(".")[0]) > step:
                path.unlink()
        self.log.rewind(step)

    def _with_metrics(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Return the one of the step before, where verl was killed between saving a step and logging it and this costs one step only."""
        if checkpoint is None or checkpoint.step in self.log.rows or self._logged(checkpoint.step):
            return checkpoint
        before = checkpoints.latest(self.run.paths.checkpoints, checkpoint.step - 1, verify=True)
        if (before.step if before else 0) < checkpoint.step - 1:
            return checkpoint
        self._passed_over(checkpoint, "the trainer ended before it wrote this step's metrics; the step is done again")
        return before

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Record a done step: merge the episodes' metrics, keep its episodes, tell the hooks. Raises TrainingError."""
        rows = episodes.gather(self.run.paths.episodes, step)
        _write_rollouts(self.run.rollouts / f"{step:06d}.jsonl.gz", rows)
        validated = self.validated(step)
        # Only after they were written elsewhere.
        episodes.discard(self.run.paths.episodes, step)
        train = self.run.config.train
        losses = episodes.losses(rows, train.prompts_per_step, train.rollouts_per_prompt)
        filtered = episodes.filtered(metrics, episodes.played_groups(rows, train.prompts_per_step)) if train.filter_groups.enabled else {}
        self.log.put(step, {**metrics, **episodes.summarise(rows), **losses, **filtered, **validated})
        findings = watch.verdicts(self.run.config.watch, self.log.rows, step)
        # A second time, since the rules read the step's metrics from the log.
        self.log.put(step, {**self.log.rows[step], **watch.levels(self.run.config.watch, findings)})
        self._tell(step)
        # Both may raise, and the step is on record by then.
        self._require_whole(step, rows)
        self._heed(findings)

    def validated(self, step: int) -> dict[str, float]:
        """Keep the greedy episodes played on dev after `step`; return their means under `dev/`, none when none were played."""
        rows = episodes.gather(self.run.paths.episodes, step, episodes.DEV)
        if rows:
            _write_rollouts(self.run.rollouts / episodes.DEV / f"{step:06d}.jsonl.gz", rows)
            episodes.discard(self.run.paths.episodes, step, episodes.DEV)
        return {f"dev/{name.removeprefix('episode/')}": value for name, value in episodes.summarise(rows).items()}

    def _logged(self, step: int) -> dict[str, float]:
        """Return what verl wrote about a step that no supervisor took up before it was killed; nothing when verl wrote nothing."""
        # Newest first: where two attempts did the step, the later one's weights went on.
        for path in sorted(self.run.logs.glob("attempt_*.metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
            for row in map(parsed, Tail(path).lines()):
                if row and row["step"] == step:
                    return numbers(row["data"])
        return {}

    def _passed_over(self, checkpoint: Checkpoint, why: str) -> None:
        share = checkpoint.step / self.run.config.train.steps
        self.progress(f"checkpoint of step {checkpoint.step} is passed over: {why}", min(1.0, share))

    def padded(self, line: str) -> None:
        """Count trajectories that verl replaced by padding, before the step is reported. Raises TrainingError past the limit."""
        if match := _PADDED.search(line):
            size, self.padding = int(match[2]), int(match[3])
            self._lose(self.padding, size, "verl replaced them by padding; the agent loop raised, see the log")

    def say(self, text: str) -> None:
        """Tell the caller what happens between two steps."""
        self.progress(text, min(1.0, self.log.last / self.run.config.train.steps))

    def _hook(self, step: int) -> None:
        self.hooks.on_step(step, self.log.rows[step])
        self.hooks.on_rollouts(step, self.run.rollouts / f"{step:06d}.jsonl.gz")

    def _tell(self, step: int) -> None:
        self._hook(step)
        metrics, steps = self.log.rows[step], self.run.config.train.steps
        reward = metrics.get("episode/reward", metrics.get("critic/score/mean", 0.0))
        self.progress(f"step {step} of {steps}, reward {reward:.3f}", min(1.0, step / steps))

    def _heed(self, findings: Sequence[Finding]) -> None:
        """Keep the last good checkpoint, tell of breaches that begin, and raise CollapseError for one that stops the run."""
        last_good = watch.keep_good(self.run.paths.checkpoints, self.run.paths.work, findings, self.log.rows)
        for finding in findings:
            if finding.stops or finding.since == finding.step:
                self.hooks.on_finding(finding, last_good)
                self.progress(f"watch {'stops' if finding.stops else 'warns'}: {finding.text}", finding.step / self.run.config.train.steps)
            if finding.stops:
                raise watch.collapse(finding, last_good)

    def _require_whole(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        train = self.run.config.train
        expected = episodes.played_groups(rows, train.prompts_per_step) * train.rollouts_per_prompt
        # Padding was counted already, when verl's log told of it.
        missing, self.padding = expected - len(rows) - self.padding, 0
        if missing > 0:
            self._lose(missing, expected, f"step {step} left no record of them; the agent loop raised, see the log")
        broken = [row for row in rows if row["stop"] == StopReason.ENGINE_FAILURE.value]
        example = f", the first with {broken[0]['error']}" if broken else ""
        self._lose(len(broken), expected, f"the engine failed in step {step}{example}")
        searches = [search for row in rows for search in row["searches"] if search["fault"] != SearchFault.EMPTY_QUERY.value]
        faults = [search for search in searches if search["fault"] is not None]
        failed = [search["error"] or search["fault"] for search in faults if SearchFault(search["fault"]).is_service]
        if len(failed) > MAX_FAILED_SEARCHES * max(len(searches), 1):
            raise TrainingError(
                f"{len(failed)} of {len(searches)} searches of step {step} failed (limit {MAX_FAILED_SEARCHES:.0%}), "
                f"the first with {failed[0]!r}; check the retriever at {self.run.retriever_url}"
            )

    def _lose(self, count: int, expected: int, why: str) -> None:
        self.lost += count
        if count:
            self.say(f"{count} of {expected} trajectories of a step were lost: {why}")
        if count > MAX_LOST * expected:
            raise TrainingError(f"{count} of {expected} trajectories of a step were lost (limit {MAX_LOST:.0%}): {why}")


def _write_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # Without a time in its header, so that equal episodes give equal bytes.
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(path)
