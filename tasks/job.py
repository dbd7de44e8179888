"""One run over one workspace: its resolved configuration, its lock, its tracker. Knows no stage and no flow.

Invariants: (1) params.yaml says what runs before anything runs; (2) one run at a time per workspace, flows and
`research run` alike; (3) services that an earlier run left behind are ended before and after, never those of a run that still
holds the lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.tasks import Task

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.errors import ConfigError, ResearchError, ServiceError, StorageError
from research_rl.pipeline.lock import locked
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.overrides import moved
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import reap
from tasks.forms import merged
from tasks.settings import stack_folder
from tasks.tracking.track import Tracker, run_name

__all__ = ["Job", "StageOutcome", "Stopped", "assignments", "flow_run_name", "folder_of", "opened", "resolve", "stop_services"]

_LOCK_WAIT_S = 15.0


class Stopped(ResearchError):
    """A stage that ran beside others was ended because the run is over: another stage failed, or the run was cancelled."""


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended: its artifact, whether it was built, and in how many seconds."""

    manifest: Manifest
    built: bool
    seconds: float


class Job:
    """What every task of a run is given; tasks add their `outcomes`.

    `force` names stages that are built even when current, `refresh` has sources asked whether their files changed, and `on_build` is
    called before the work of a stage begins.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        tracker: Tracker,
        force: frozenset[str] = frozenset(),
        *,
        refresh: bool = False,
        on_build: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.workspace, self.tracker, self.force = config, workspace, tracker, force
        self.refresh, self.on_build = refresh, on_build
        self.outcomes: dict[str, StageOutcome] = {}
        # Names of the tasks that started the servers of this job, results by which Prefect draws the edges to them.
        self.servers: tuple[str, ...] = ()
        self._beside: list[PrefectFuture[Any]] = []
        self._over = threading.Event()

    def submit(self, stage: Task[[Job], State[Manifest]], *after: Any) -> PrefectFuture[Any]:
        """Start a stage beside those that follow in the flow, once the results `after` stand.

        However the run ends, it is waited for before the workspace is given up.
        """
        # Prefect's types know the parameters of the task alone.
        future = stage.submit(self, wait_for=after)  # pyright: ignore[reportCallIssue]
        self._beside.append(future)
        return future

    def stands(self, *stages: str) -> bool:
        """Return whether all of these stages stand whole, as this run would leave them, and say so; not where one is to be forced."""
        if self.force or not all(current(name, self.config, self.workspace) for name in stages):
            return False
        get_run_logger().info("the sources hold nothing new; %s stand as they are", ", ".join(stages))
        return True

    def proceed(self) -> None:
        """Return while the run goes on. Raises Stopped once it is over; stages ask with every report of progress."""
        if self._over.is_set():
            raise Stopped("ended because another stage of this run failed or the run was cancelled; its finished work is used next time")

    def join(self, status: str) -> None:
        """Wait for the stages that run beside; unless the run has FINISHED they end at their next report of progress."""
        if status != "FINISHED":
            self._over.set()
        for future in self._beside:
            future.wait()

    def using(self, server: str, **sections: Any) -> Job:
        """Return the same job with some configuration sections replaced, so that they name a server that was started."""
        config = self.config.model_copy(update=sections)
        other = Job(config, self.workspace, self.tracker, self.force, refresh=self.refresh, on_build=self.on_build)
        # Shared, not copied: stages of both belong to one run.
        other.outcomes, other._beside, other._over = self.outcomes, self._beside, self._over
        other.servers = (*self.servers, server)
        return other


def resolve(folder: Path, profile: str | None, overrides: Mapping[str, Any]) -> Config:
    """Return the configuration of a run: a profile, else the workspace's params.yaml, else laptop; then the overrides.

    Raises ConfigError for an unknown profile or parameter.
    """
    if profile is None and (folder / "params.yaml").is_file():
        return configuration.load(folder / "params.yaml", overrides)
    return configuration.load_profile(profile or "laptop", overrides)


def folder_of(workspace: Any) -> Path:
    """Return the folder that a flow's parameter names; it need not be there. Raises ConfigError for a text that names none."""
    try:
        folder = Path(str(workspace)).expanduser().resolve()
        # Refuses a name that no file system takes, which `resolve` passes.
        folder.is_dir()
        return folder
    except (ValueError, RuntimeError, OSError) as error:  # a NUL; `~nobody`; links in a circle, a name of more than 255 bytes
        raise ConfigError(
            f"workspace={str(workspace)[:200]!r} names no folder ({error!s:.200}); give a path that exists or can be made"
        ) from None


def _make(folder: Path) -> None:
    """Make a workspace's folder where it is not there. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"workspace={str(folder)[:200]!r} cannot be made ({error.strerror}); name a folder in which this user may write"
        ) from None


def assignments(items: Sequence[str]) -> dict[str, Any]:
    """Turn `section.key=value` arguments into overrides. Raises ConfigError."""
    return dict(configuration.assignment(item) for item in items)


@contextmanager
def opened(
    workspace: str,
    profile: str | None,
    overrides: Mapping[str, Any],
    *,
    flow: str | None = None,
    run_id: str | None = None,
    force: Iterable[str] = (),
    refresh: bool = False,
    only: Sequence[str] = (),
    writes: bool = True,
) -> Generator[Job]:
    """Lock the workspace, write params.yaml, start tracking; close all of it on any exit. `flow` and `run_id`: this run's when left out.

    params.yaml is put back when the run fails before anything was built; without `writes` it is not touched. With `only`, the stages
    that the flow builds, an override that decides another stage is refused: ConfigError.
    """
    flow, run_id = flow or str(flow_run.flow_name), run_id or str(flow_run.id)
    root = folder_of(workspace)
    config = resolve(root, profile, overrides)
    _make(root)
    space = Workspace(root)
    with locked(space, 0.0, f"{flow}, run {run_id[:8]}"):
        # Under the lock: no other run is there whose services could be ended.
        reap_all(space)
        if only:
            _leaves(config, space, only)
        with ExitStack() as written:
            on_build: Callable[[], None] = lambda: None  # noqa: E731
            if writes:
                on_build = written.enter_context(configuration.written(config, root / "params.yaml", get_run_logger().info)).keep
            tracker = Tracker.start(config, space, flow=flow, run_id=run_id)
            with _ended(Job(config, space, tracker, frozenset(force), refresh=refresh, on_build=on_build)) as job:
                yield job


@contextmanager
def _ended(job: Job) -> Generator[Job]:
    """Wait for the stages that run beside and close tracking, on any exit, with the state that the run ended in."""
    # What neither ends nor raises an Exception was cancelled or killed.
    status = "KILLED"
    try:
        yield job
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        # Before the lock is given up: a stage that runs beside still writes into the workspace.
        job.join(status)
        job.tracker.close(status)


def _leaves(config: Config, workspace: Workspace, only: Sequence[str]) -> None:
    """Raise ConfigError when `config` would make a stage stale that is not among `only`."""
    path = workspace.root / "params.yaml"
    if not path.is_file():
        return
    changes = moved(configuration.load(path), config, workspace)
    if stale := {name: lines for name, lines in changes.items() if name not in only}:
        lines = dict.fromkeys(line for lines in stale.values() for line in lines)
        raise ConfigError(
            f"{'; '.join(lines)}: this flow builds {', '.join(only)} and would leave {', '.join(stale)} stale; leave the override out, "
            "or give it to research-train, in a workspace of its own if both are to stand"
        )


def flow_run_name() -> str:
    """Return what a flow run is called: its flow, profile and seed. Prefect calls it before the run starts."""
    parameters, flow = flow_run.parameters, str(flow_run.flow_name)
    try:
        root = folder_of(parameters.get("workspace", "."))
        return run_name(flow, resolve(root, parameters.get("profile"), merged(flow, parameters)))
    except ConfigError:  # the run itself says what is wrong with its parameters
        return flow


def reap_all(workspace: Workspace) -> list[str]:
    """End what an earlier run left behind in a workspace, never what `make up` started; return the names."""
    folders = [workspace.services, *sorted(item for item in workspace.services.glob("*") if item.is_dir())]
    return [name for folder in folders if folder.name != stack_folder().name for name in reap(folder)]


def stop_services(flow: Any, flow_run: Any, state: Any) -> None:
    """Flow hook: end what a failed, cancelled or crashed run left behind. Leaves the workspace alone while a run holds it."""
    try:
        # A hook gets no argument of the flow; the run's parameters say which workspace it was.
        workspace = Workspace(folder_of(flow_run.parameters.get("workspace", ".")))
        if not workspace.services.is_dir():
            return
        with locked(workspace, _LOCK_WAIT_S, f"clean-up after {flow_run.name}"):
            for name in reap_all(workspace):
                logging.getLogger("prefect.flow_runs").warning("ended %s, left behind by %s", name, flow_run.name)
    except (ConfigError, ServiceError, StorageError) as error:
        logging.getLogger("prefect.flow_runs").warning("services were left alone: %s", error)
