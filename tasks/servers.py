"""The servers of a run, each a task of its own: the retriever for the stages that search, a model server for an evaluation.

A server is started only when a stage that asks it will be built, and ends with the block. The stage before whose node in Prefect's graph
it stands finds its name in `job.servers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from research_rl.config import located
from research_rl.pipeline.run import current
from research_rl.process.services import Endpoint
from research_rl.report import markdown
from research_rl.retriever import TOKEN as RETRIEVER_TOKEN
from research_rl.retriever.command import running as retriever_running
from research_rl.serving.offer import TOKEN_VARIABLE as MODEL_TOKEN
from research_rl.serving.serve import running as model_running
from tasks.artifacts import showing
from tasks.job import Job

__all__ = ["model_server", "retriever"]

Start = Callable[[], AbstractContextManager[Endpoint]]


@contextmanager
def retriever(job: Job, stages: Iterable[str], after: Sequence[Any] = ()) -> Generator[Job]:
    """Yield a job whose retriever.url answers.

    Nothing is started when every one of `stages` is current, a url is configured or a tape is replayed.
    """
    searching, given = _pending(job, stages), job.config.retriever
    if not searching or given.url or given.urls or given.tape == "replay":
        yield job
        return
    with ExitStack() as stack:
        shown, endpoint = _started("retriever", lambda: retriever_running(job.config, job.workspace), searching, stack, after)
        stack.enter_context(_token(RETRIEVER_TOKEN, endpoint.token))
        yield job.using(shown, retriever=job.config.retriever.model_copy(update={"url": endpoint.url}))


@contextmanager
def model_server(job: Job, stage: str, parent: str, after: Sequence[Any] = ()) -> Generator[Job]:
    """Yield a job whose serving.url answers with the model of the stage `parent`; as `retriever`, for the evaluation `stage`."""
    if not _pending(job, [stage]) or job.config.serving.url:
        yield job
        return
    config, folder = located(job.config, job.workspace.root), job.workspace.folder(parent)
    name = f"{stage}-model"
    with ExitStack() as stack:
        shown, endpoint = _started(name, lambda: model_running(config, job.workspace, folder, name=name), [stage], stack, after)
        stack.enter_context(_token(MODEL_TOKEN, endpoint.token))
        yield job.using(shown, serving=job.config.serving.model_copy(update={"url": endpoint.url}))


def _pending(job: Job, stages: Iterable[str]) -> list[str]:
    """Return the stages that will be built."""
    # By sizes alone: the stages compare the bytes themselves before they are skipped.
    return [name for name in stages if name in job.force or current(name, job.config, job.workspace, verify=False) is None]


def _started(name: str, start: Start, stages: Sequence[str], stack: ExitStack, after: Sequence[Any]) -> tuple[str, Endpoint]:
    """Start a server within a task called `name`; `stack` ends it. Return the task's result, and where it answers.

    Raises what `start` raises.
    """
    endpoints: list[Endpoint] = []

    # The endpoint holds a token, which must not be among Prefect's results.
    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def serve() -> str:
        endpoint = stack.enter_context(start())
        endpoints.append(endpoint)
        get_run_logger().info("%s at %s for %s", name, endpoint.url, ", ".join(stages))
        _show(name, endpoint, stages)
        return name

    return serve(wait_for=after), endpoints[0]


def _show(name: str, endpoint: Endpoint, stages: Sequence[str]) -> None:
    """Publish where a server answers while the run goes on."""
    links = [f"[{what}]({endpoint.url}/{what})" for what in ("health", "metrics")]
    rows = [
        ("address", endpoint.url),
        ("serves", endpoint.model or "the workspace's index"),
        ("for", ", ".join(stages)),
        ("look", ", ".join(links)),
    ]
    with showing(f"where the {name} answers"):
        text = f"# {name}\n\n{markdown.table(('', ''), rows)}\n\nIt ends with the stages that it is for."
        create_markdown_artifact(text, key=f"{name}-of-the-run", description=f"{name} at {endpoint.url}")


@contextmanager
def _token(variable: str, token: str | None) -> Generator[None]:
    """Put the token where the clients of this process and of its children look for it."""
    before = os.environ.get(variable)
    if token:
        os.environ[variable] = token
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
