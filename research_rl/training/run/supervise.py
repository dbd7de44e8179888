"""Run verl's trainer as a watched subprocess until every step is done. Knows processes, files and deadlines; knows no stage.

Invariants: (1) nothing an attempt started outlives it (`launch`), Ray's daemons included; (2) an attempt that is
silent past its deadline is ended and the next resumes from the last whole checkpoint; (3) `metrics.jsonl` and `rollouts/`
hold each step exactly once, whatever was killed in between; (4) time in which searching paused counts against no deadline,
and is itself bounded by `retriever.pause_max_s`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from research_rl.errors import TrainingError
from research_rl.pipeline.stages import Progress
from research_rl.training.run import checkpoints
from research_rl.training.run.attempt import Attempt, AttemptFailure
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.metrics_log import MetricsLog
from research_rl.training.run.records import Records
from research_rl.training.run.remote import Uploader, restore
from research_rl.training.run.run import AttemptOutcome, Run, TrainHooks

__all__ = ["supervise"]

# Ray puts a process's name, in colour, before each line that a worker writes.
_ERROR = re.compile(r"^(?:\x1b\[\d+m\(.*?\)\x1b\[0m )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)


def supervise(run: Run, hooks: TrainHooks, progress: Progress) -> AttemptOutcome:
    """Train until `train.steps` are done; resume after a failure. Raises TrainingError with the last log lines."""
    # First: a trainer of an earlier process would write into the folders that are read next.
    run.launcher.reap()
    _make_folders(run)
    _restore(run, progress)
    state = Records(run, hooks, progress, MetricsLog(run.metrics))
    state.replay()
    with _uploading(run, progress) as state.uploader:
        checkpoint = _train(state)
    if checkpoint.step < state.log.last:
        state.say(
            f"the checkpoint of step {checkpoint.step} is taken from a run of {state.log.last} steps, which stays in {run.paths.work}"
        )
    else:
        checkpoints.prune(run.paths.checkpoints, run.config.trainer.keep_checkpoints)
    return AttemptOutcome(checkpoint, state.attempts(), state.lost)


def _train(state: Records) -> Checkpoint:
    """Start the trainer until the last step has a whole checkpoint. Raises TrainingError."""
    run = state.run
    failures: list[AttemptFailure] = []
    while (checkpoint := state.rewind()) is None or checkpoint.step < run.config.train.steps:
        # After two starts in a row without a step a third would most likely end alike.
        if len(failures) >= run.config.trainer.max_attempts or [f.progressed for f in failures[-2:]] == [False, False]:
            raise TrainingError(_explain(run, failures))
        failure = Attempt(state, checkpoint).run()
        failures += [failure] if failure else []
    return checkpoint


def _restore(run: Run, progress: Progress) -> None:
    """Bring the newest checkpoint from S3 when none that is as new lies here."""
    if run.store:
        newest = checkpoints.latest(run.paths.checkpoints, run.config.train.steps)
        restore(run.store, run.paths.work, run.paths.checkpoints, newest.step if newest else 0, run.config.train.steps, _to(progress))


@contextmanager
def _uploading(run: Run, progress: Progress) -> Generator[Uploader | None]:
    """Copy checkpoints to S3 for the length of a block; its regular end waits for the last one."""
    if run.store is None:
        yield None
        return
    uploader = Uploader(run.store, run.paths.work, run.config.trainer.keep_checkpoints, _to(progress))
    finished = False
    try:
        yield uploader
        finished = True
    finally:
        # After an error nothing is waited for: the next run sends what lies in the folder of copies.
        if not uploader.close(run.config.trainer.upload_wait_s if finished else 0.0):
            progress("checkpoints are left to be copied to S3; the next run of this stage goes on with them", 1.0)


def _to(progress: Progress) -> Callable[[str], None]:
    return lambda text: progress(text, 0.0)


def _explain(run: Run, failures: Sequence[AttemptFailure]) -> str:
    last = failures[-1]
    history = "; ".join(f"attempt {f.attempt} {f.why}" for f in failures)
    log = run.logs / f"attempt_{last.attempt}.log"
    first = _ERROR.search(log.read_text(errors="replace"))
    return (
        f"the trainer did not finish: {history} "
        f"(trainer.max_attempts={run.config.trainer.max_attempts}, two in a row without a step end it). "
        f"{f'The first error was {first[1]!r}. ' if first else ''}The log {log} ends with:\n{last.tail}"
    )


def _make_folders(run: Run) -> None:
    for folder in (run.paths.work, run.rollouts, run.logs, run.paths.checkpoints, run.paths.episodes):
        folder.mkdir(parents=True, exist_ok=True)
