"""The retriever as a guarded service for the stages that search; started once, and only when one of them will be built."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from prefect import get_run_logger

from research_rl.pipeline.run import current
from research_rl.retriever import TOKEN
from research_rl.retriever.command import running
from tasks.job import Job

__all__ = ["retriever"]


@contextmanager
def retriever(job: Job, stages: Iterable[str]) -> Generator[Job]:
    """Yield a job whose retriever.url answers. Nothing is started when every one of `stages` is current or a url is configured."""
    # By sizes alone: the stages compare the bytes themselves before they are skipped.
    searching = [name for name in stages if name in job.force or current(name, job.config, job.workspace, verify=False) is None]
    if not searching or job.config.retriever.url or job.config.retriever.urls:
        yield job
        return
    with running(job.config, job.workspace) as endpoint, _token(endpoint.token):
        get_run_logger().info("retriever at %s for %s", endpoint.url, ", ".join(searching))
        yield job.using(retriever=job.config.retriever.model_copy(update={"url": endpoint.url}))


@contextmanager
def _token(token: str | None) -> Generator[None]:
    """Put the token where the clients of this process and of its children look for it."""
    before = os.environ.get(TOKEN)
    if token:
        os.environ[TOKEN] = token
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TOKEN, None)
        else:
            os.environ[TOKEN] = before
