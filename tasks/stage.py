"""Turn a stage into a Prefect task: retries, skipping, progress, tracking. Knows no stage's work.

The manifest is the cache: a stage whose artifact fits configuration and parents ends as `Cached` without running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.states import Cancelled, Completed
from prefect.tasks import Task, exponential_backoff

from research_rl.errors import ServiceError
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.remaining import Remaining
from research_rl.pipeline.run import run_stage, work_of
from research_rl.pipeline.stages import STAGES, Context, Stage
from tasks import limits, quiet
from tasks.job import Job, StageOutcome, Stopped
from tasks.tracking.track import StageRun

__all__ = ["StageTask", "is_transient", "retried", "stage_task"]

# When the tasks are imported, before any run logs.
quiet.install(quiet.WithoutTraceback)
RETRIES = 2
BACKOFF_S = 2
_UPDATE_S = 2.0
_LOG_S = 20.0

P = ParamSpec("P")
R = TypeVar("R")
StageTask = Task[[Job], State[Manifest]]
After = Callable[[Job, Manifest, StageRun], None]
Build = Callable[[Context, StageRun], None]
Work = Callable[[Context], None]


def retried(name: str, description: str, *, jitter: float | None = None) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Return the decorator of a task that is tried again after what may pass; `jitter` spreads the tries by up to that share."""
    return task(
        name=name,
        task_run_name=name,
        description=description,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(BACKOFF_S),
        retry_jitter_factor=jitter,
        retry_condition_fn=is_transient,
        # Manifests and cells decide what is current; Prefect's cache would keep results whose files are gone.
        cache_policy=NO_CACHE,
        persist_result=False,
    )


def stage_task(name: str, *, after: After | None = None, build: Build | None = None, heavy: bool = False) -> StageTask:
    """Return the task of stage `name`. `after` shows what stands; `build` does the stage's work where tracking takes part in it.

    The work of a `heavy` stage holds a place in the limit of its pool.
    """
    stage = STAGES[name]

    @retried(name, stage.summary, jitter=0.5)
    def run(job: Job) -> State[Manifest]:
        try:
            return _ended(name, _outcome(stage, job, after, build, heavy))
        except Stopped as stopped:
            # Not failed: the stage that ended the run has the reason, and this one is not tried again.
            return Cancelled(message=f"{name}: {stopped}")

    return run  # type: ignore[return-value]


def _outcome(stage: Stage, job: Job, after: After | None, build: Build | None, heavy: bool) -> StageOutcome:
    """Run a stage under tracking, show what stands, and note how it ended."""
    progress = Progress(stage.name, get_run_logger().info, job.proceed)
    with job.tracker.stage(stage.name, job.config, stage.sections) as run:
        started = time.monotonic()
        plain: Work | None = (lambda context: build(context, run)) if build else None
        work = _in_its_place(plain or work_of(stage)) if heavy else plain
        manifest, built = run_stage(
            stage.name,
            job.config,
            job.workspace,
            force=stage.name in job.force,
            refresh=job.refresh,
            progress=progress,
            function=work,
            on_build=job.on_build,
        )
        run.finished(manifest, built)
        progress.finish()
        job.outcomes[stage.name] = outcome = StageOutcome(manifest, built, time.monotonic() - started)
        if after:
            after(job, manifest, run)
    return outcome


def _in_its_place(work: Work) -> Work:
    """Return work that waits for its place. An artifact that is current takes none, since nothing is then built."""

    def waiting(context: Context) -> None:
        with limits.place():
            work(context)

    return waiting


def _ended(name: str, outcome: StageOutcome) -> State[Manifest]:
    manifest = outcome.manifest
    if not outcome.built:
        return Completed(name="Cached", message=f"{name} is current and was skipped: {manifest.hash[:12]}", data=manifest)
    counts = ", ".join(f"{key} {value:,}" for key, value in manifest.counts.items())
    return Completed(message=f"{name} was built in {outcome.seconds:.1f} s: {counts}; {manifest.hash[:12]}", data=manifest)


def is_transient(task: Any, run: Any, state: State[Any]) -> bool:
    """Return whether a failed task is worth another try: a service or a connection failed, not a parameter or the data."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ServiceError | ConnectionError | TimeoutError | httpx.TransportError)


class Progress:
    """Progress of a stage, with the time that is left, as a Prefect progress artifact, made once a stage takes longer than two seconds.

    An unreachable Prefect server ends the showing, never the stage. `proceed` is called first and may raise to end the stage.
    """

    def __init__(self, stage: str, log: Callable[[str], None], proceed: Callable[[], None] = lambda: None) -> None:
        self.stage, self.log, self.proceed = stage, log, proceed
        self.started = self.updated = self.logged = time.monotonic()
        self.artifact: Any = None
        self.lost = False
        self.remaining = Remaining()

    def __call__(self, text: str, share: float) -> None:
        self.proceed()
        # Asked for every report: it learns the rate from those that are not shown, too.
        text, now = text + self.remaining(share), time.monotonic()
        if now - self.logged > _LOG_S:
            self.logged = now
            self.log(f"{self.stage} {share:.0%}: {text}")
        if not self.lost and now - self.updated > _UPDATE_S:
            self.updated = now
            self._show(text, round(100 * min(1.0, max(0.0, share)), 1))

    def finish(self) -> None:
        """Show that all of it is done, where anything was shown."""
        if self.artifact is not None and not self.lost:
            self._show("done", 100.0)

    def _show(self, text: str, percent: float) -> None:
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=f"{self.stage}-progress", description=text)
            else:
                update_progress_artifact(self.artifact, progress=percent, description=text)
        except (httpx.HTTPError, PrefectException) as error:
            # Once is enough: asking a dead server at every report would slow the stage down.
            self.lost = True
            self.log(f"progress of {self.stage} is no longer shown: {error}")
