"""One start of the trainer: watched until it is done, has ended, or is silent past its deadline."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research_rl.errors import TrainingError
from research_rl.retriever import TOKEN
from research_rl.retriever.source import lacking
from research_rl.training.run import checkpoints, launch, overrides, watch
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.metrics_log import Tail, numbers, parsed
from research_rl.training.run.overrides import Paths
from research_rl.training.run.pauses import Pauses
from research_rl.training.run.records import Records

__all__ = ["Attempt", "AttemptFailure"]

_POLL_S = 0.2
_TELL_S = 5.0
_TAIL_LINES = 30
_SHOWN = 100
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class AttemptFailure:
    """Why a start of the trainer has to be followed by another, whether it made a step, and the end of its log."""

    attempt: int
    why: str
    progressed: bool
    tail: str


@dataclass
class Attempt:
    """One start of the trainer."""

    state: Records
    resume: Checkpoint | None
    number: int = 0
    steps: int = 0
    # When the last step was reported, by the monotonic clock and in Unix time.
    last: float = 0.0
    last_at: float = 0.0
    announced: int = 0
    reported_at: float = 0.0
    heard: str = "nothing yet"
    sealing: tuple[Checkpoint, Future[None]] | None = None

    def __post_init__(self) -> None:
        self.sealer = ThreadPoolExecutor(1, "checkpoint-seal")
        self.pauses = Pauses(self.state.run.paths.pauses, self.state.run.config.retriever.pause_max_s)

    def run(self) -> AttemptFailure | None:
        """Start, watch and end the trainer; return why it must be started again, None when all steps are done."""
        self.number = self.state.attempts() + 1
        self.announced = self.resume.step if self.resume else 0
        paths = replace(self.state.run.paths, resume=self.resume.path if self.resume else None)
        shutil.rmtree(paths.ray, ignore_errors=True)
        shutil.rmtree(paths.pauses, ignore_errors=True)
        hooks = self.state.hooks
        hooks.on_attempt(self.number, self.announced)
        process = self._start(paths)
        # Told to the hooks where `_watch` raises; else its answer takes this place.
        why: str | None = "was stopped by an error of its caller"
        try:
            why = self._watch(process)
        finally:
            process.stop()
            self.sealer.shutdown()
            shutil.rmtree(paths.ray, ignore_errors=True)
            hooks.on_attempt_end(self.number, why)
        return AttemptFailure(self.number, why, self.steps > 0, process.tail(_TAIL_LINES)) if why else None

    def _start(self, paths: Paths) -> launch.Started:
        run = self.state.run
        paths.agent.write_text(overrides.agent_yaml(run.config, paths, run.retriever_url, run.taping))
        env = overrides.environment(run.config, paths, secrets.token_hex(32))
        env["VERL_FILE_LOGGER_PATH"] = str(self._raw_metrics)
        # An ended trainer has nothing left to save: what counts is on disk as a whole checkpoint.
        env["RESEARCH_GRACE_S"] = "3"
        if run.retriever_token:
            env[TOKEN] = run.retriever_token
        command = [str(run.interpreter), "-m", "verl.trainer.main_ppo", *overrides.render(run.config, paths)]
        return run.launcher.start(command, env, paths.work, self._log)

    @property
    def _log(self) -> Path:
        return self.state.run.logs / f"attempt_{self.number}.log"

    @property
    def _raw_metrics(self) -> Path:
        return self.state.run.logs / f"attempt_{self.number}.metrics.jsonl"

    def _watch(self, process: launch.Started) -> str | None:
        metrics, log = Tail(self._raw_metrics), Tail(self._log)
        self.last = self.reported_at = time.monotonic()
        self.last_at = time.time()
        while True:
            # Asked before the files are read: what was written up to the end is then read for certain.
            ended = process.poll()
            # The log before the metrics: padding must be known when the step that has it is recorded.
            for line in log.lines():
                self.state.padded(line)
                self.heard = _COLOUR.sub("", line).strip() or self.heard
            self._tell_of_the_start()
            self._hear_of_pauses()
            for line in metrics.lines():
                if (row := parsed(line)) is None:
                    return f"wrote a line of metrics that is none, as a full disk leaves it: {line:.100}"
                self._step(row)
            self._announce()
            if self._done():
                return None
            if ended is not None and self.sealing is None:
                return f"ended with code {ended}"
            if ended is None and not self._only_seals_are_left() and (why := self._silent()):
                return why
            time.sleep(_POLL_S)

    def _step(self, row: dict[str, Any]) -> None:
        step = int(row["step"])
        if step == (self.resume.step if self.resume else 0):
            self.state.validated(step)  # the validation before the first step
            return
        self._require_tape()
        # Before anything is written: a pause that goes on meanwhile belongs to the next step.
        # One moment ends this step's time and begins the next one's, so that no part of a pause is in neither.
        self.last, now = time.monotonic(), time.time()
        paused, self.last_at = self.pauses.seconds(self.last_at, now), now
        self.state.finish(step, {**numbers(row["data"]), **watch.not_finite(row["data"]), "search/paused_s": paused})
        self.steps += 1

    def _tell_of_the_start(self) -> None:
        """Say every few seconds how long the first step is waited for and what the trainer wrote last."""
        # Ray, weights, engine and kernels take minutes, in which there is no step to tell of.
        now, limit = time.monotonic(), self.state.run.config.trainer.start_deadline_s
        if self.steps or now < self.reported_at + _TELL_S:
            return
        self.reported_at = now
        self.state.say(f"the trainer starts, {now - self.last:.0f} s of at most {limit:g} s; its log: {self.heard[:_SHOWN]}")

    def _require_tape(self) -> None:
        """Raise TrainingError when a worker searched for what a replayed tape lacks: the policy was trained without that search."""
        taping = self.state.run.taping
        if taping and (text := lacking(taping)):
            raise TrainingError(f"{text}: the next run goes on from its last checkpoint")

    def _hear_of_pauses(self) -> None:
        """Tell of pauses. Raises TrainingError when a worker gave the retriever up."""
        retriever, url = self.state.run.config.retriever, self.state.run.retriever_url
        for note in self.pauses.news():
            faults = ", ".join(f"{count} {fault}" for fault, count in note["faults"].items())
            failed = f"{sum(note['faults'].values())} of {note['searches']} recent searches failed ({faults})"
            if note["event"] == "gave_up":
                raise TrainingError(
                    f"{failed} and {url} was not healthy again within retriever.pause_max_s={retriever.pause_max_s:g}; "
                    f"repair the retriever and run the stage again, it goes on from its last checkpoint"
                )
            waits = f"paused: {failed}; waiting for {url}, at most {retriever.pause_max_s:g} s"
            self.state.say(waits if note["event"] == "paused" else "the retriever is healthy again; training goes on")

    def _announce(self) -> None:
        """Seal a checkpoint and tell the hooks, once verl's tracker (written after its files) names it and its step is recorded."""
        folder = self.state.run.paths.checkpoints
        if self.sealing and self.sealing[1].done():
            (checkpoint, sealed), self.sealing = self.sealing, None
            sealed.result()
            self.announced = checkpoint.step
            if self.state.uploader:
                self.state.uploader.offer(checkpoint)
            self.state.hooks.on_checkpoint(checkpoint.step, checkpoint.path)
            # Last: where sealing took long, enough newer checkpoints may stand for this one to go.
            checkpoints.prune(folder, self.state.run.config.trainer.keep_checkpoints, self.state.log.last)
        # In the same turn as the end of an earlier seal: a trainer that has ended in the meantime counts as finished
        # once no seal is under way, and its newest checkpoint would be told to nobody.
        if self.sealing is None:
            step = _tracked(folder / "latest_checkpointed_iteration.txt")
            path = folder / f"global_step_{step}"
            if self.announced < step <= self.state.log.last and checkpoints.fault(path) is None:
                # Every byte is read, for minutes where the model is large; steps are reported meanwhile.
                self.sealing = Checkpoint(step, path), self.sealer.submit(checkpoints.seal, path)

    def _only_seals_are_left(self) -> bool:
        """Whether all steps are done and a checkpoint's seal is waited for, so that no further step is to come."""
        return self.sealing is not None and self.state.log.last >= self.state.run.config.train.steps

    def _done(self) -> bool:
        return self.announced >= self.state.run.config.train.steps and self.state.log.last >= self.state.run.config.train.steps

    def _silent(self) -> str | None:
        trainer = self.state.run.config.trainer
        name = "step_deadline_s" if self.steps else "start_deadline_s"
        limit: float = getattr(trainer, name)
        silence = time.monotonic() - self.last - self.pauses.seconds(self.last_at, time.time())
        return (
            f"made no step for {silence:.0f} s (trainer.{name}={limit:g}; raise it if steps really take longer)"
            if silence > limit
            else None
        )


def _tracked(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
