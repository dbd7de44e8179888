"""One run of a deployment at a time, and one training or evaluation at a time in each work pool. Knows Prefect's limits.

Invariants: (1) a process that was killed keeps its place for LEASE_S and the server's next look at most; (2) a limit that a user changed
stays as it is; (3) a run without a pool, or on a server that has no such limit, waits for nobody; (4) a server that is away for a while
ends no run.

Two kinds of limits of Prefect 3.8 are not used. Limits by tag lend their places for a hundred years, so that a killed run would keep its
place for ever. The limit of a deployment has its run renew its place after each 225 s, and ends the run when the server does not answer
then for about 45 s. The limit of a queue counts the runs that are Pending or Running in the database, and lends nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from research_rl.paths import CHECKOUT

__all__ = ["LEASE_S", "POOLS", "PROJECTS", "apply", "apply_to_queues", "limit_of", "place", "queues"]

LEASE_S = 60
"""The shortest that Prefect lends for; a living process renews it after three quarters of it."""
POOLS = {"laptop": 1, "gpu": 1, "multinode": 1, "docker": 1}
"""Pools that stand for one machine or one cluster, and how many trainings and evaluations it has room for."""
PROJECTS = (CHECKOUT / "prefect.yaml", CHECKOUT / "infra" / "prefect" / "images.yaml")
"""The files that name the deployments, each with a queue of its own."""


def queues(project: Path) -> Iterator[tuple[str, str]]:
    """Yield pool and queue of each deployment of a file."""
    for deployment in yaml.safe_load(project.read_text())["deployments"]:
        yield deployment["work_pool"]["name"], deployment["work_pool"]["work_queue_name"]


def limit_of(pool: str) -> str:
    """Return the name of a pool's limit."""
    return f"research-heavy-{pool}"


@contextmanager
def place() -> Generator[None]:
    """Hold a place in the pool of the flow that runs; wait until there is one. A server that is lost meanwhile ends nothing."""
    run = FlowRunContext.get()
    pool = run.flow_run.work_pool_name if run and run.flow_run else None
    if pool not in POOLS:
        yield
        return
    name = limit_of(pool)
    get_run_logger().info("asks for a place of the limit %s", name)
    with concurrency(name, lease_duration=LEASE_S, strict=False, raise_on_lease_renewal_failure=False):
        yield


def apply(client: SyncPrefectClient, pools: Iterable[str] = POOLS) -> list[str]:
    """Make the limit of each pool that the server lacks; return one line for each."""
    return [f"{_applied(client, limit_of(pool), POOLS[pool])}: {limit_of(pool)}" for pool in pools]


def apply_to_queues(client: SyncPrefectClient, pool: str | None = None) -> list[str]:
    """Let the queue of each deployment, of one pool or of all, give out one run at a time; return a line for each. Pools have to stand."""
    named = [item for project in PROJECTS for item in queues(project) if pool in (None, item[0])]
    return [f"{_limited(client, *item)}: queue {'/'.join(item)}" for item in named]


def _applied(client: SyncPrefectClient, name: str, limit: int) -> str:
    try:
        return f"kept at {client.read_global_concurrency_limit_by_name(name).limit}"
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
        return f"made at {limit}"


def _limited(client: SyncPrefectClient, pool: str, queue: str) -> str:
    try:
        standing = client.read_work_queue_by_name(queue, pool).concurrency_limit
    except ObjectNotFound:
        client.create_work_queue(queue, work_pool_name=pool, concurrency_limit=1)
        return "made at 1"
    if standing is None:
        # Made by the deployment, which knows no limit of a queue.
        path = {"work_pool_name": pool, "name": queue}
        client.request("PATCH", "/work_pools/{work_pool_name}/queues/{name}", path_params=path, json={"concurrency_limit": 1})
    return f"kept at {standing or 1}"
