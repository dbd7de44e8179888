"""Turn a stage into a Prefect task: retries, skipping, progress, tracking. Knows no stage's work.

The manifest is the cache: a stage whose artifact fits configuration and parents ends as `Cached` without running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

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
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import STAGES, Context, Stage
from tasks import quiet
from tasks.job import Job, StageOutcome, Stopped
from tasks.tracking.track import StageRun

__all__ = ["StageTask", "is_transient", "stage_task"]

# When the tasks are imported, before any run logs.
quiet.install(quiet.WithoutTraceback)
RETRIES = 2
BACKOFF_S = 2
_UPDATE_S = 2.0
_LOG_S = 20.0

StageTask = Task[[Job], State[Manifest]]
After = Callable[[Job, Manifest, StageRun], None]
Build = Callable[[Context, StageRun], None]


def stage_task(name: str, *, after: After | None = None, build: Build | None = None) -> StageTask:
    """Return the task of stage `name`. `after` shows what stands; `build` does the stage's work where tracking takes part in it."""
    stage = STAGES[name]

    @task(
        name=name,
        task_run_name=name,
        description=stage.summary,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(BACKOFF_S),
        retry_jitter_factor=0.5,
        retry_condition_fn=is_transient,
        # The manifest decides what is current; Prefect's cache would keep results whose files are gone.
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def run(job: Job) -> State[Manifest]:
        try:
            return _ended(name, _outcome(stage, job, after, build))
        except Stopped as stopped:
            # Not failed: the stage that ended the run has the reason, and this one is not tried again.
            return Cancelled(message=f"{name}: {stopped}")

    return run  # type: ignore[return-value]


def _outcome(stage: Stage, job: Job, after: After | None, build: Build | None) -> StageOutcome:
    """Run a stage under tracking, show what stands, and note how it ended."""
    progress = Progress(stage.name, get_run_logger().info, job.proceed)
    with job.tracker.stage(stage.name, job.config, stage.sections) as run:
        started = time.monotonic()
        work = partial(build, run=run) if build else None
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
    """Progress of a stage as a Prefect progress artifact, made only once a stage takes longer than two seconds.

    An unreachable Prefect server ends the showing, never the stage. `proceed` is called first and may raise to end the stage.
    """

    def __init__(self, stage: str, log: Callable[[str], None], proceed: Callable[[], None] = lambda: None) -> None:
        self.stage, self.log, self.proceed = stage, log, proceed
        self.started = self.updated = self.logged = time.monotonic()
        self.artifact: Any = None
        self.lost = False

    def __call__(self, text: str, share: float) -> None:
        self.proceed()
        now = time.monotonic()
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
