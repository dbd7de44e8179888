"""`python -m tasks.local.pools`: the work pools of the configured Prefect server, each with what a run of it is made of.

Invariant: a pool that stands keeps its places and whether it is paused; only what its runs are made of is written anew.
"""

from __future__ import annotations

import json

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from research_rl.paths import CHECKOUT
from research_rl.terminal import say

__all__ = ["POOLS", "TEMPLATES", "apply", "main"]

POOLS = {"laptop": "process", "gpu": "process", "multinode": "process", "docker": "docker", "kubernetes": "kubernetes"}
"""Work pools and their types."""
TEMPLATES = {kind: CHECKOUT / "infra" / "prefect" / f"{kind}.json" for kind in ("docker", "kubernetes")}
"""What a run of a pool is made of, by the type of the pool; the other types have Prefect's own."""


def apply(client: SyncPrefectClient) -> list[str]:
    """Make each pool, or bring its template to now; return one line for each."""
    return [f"{_applied(client, name, kind)}: {name}" for name, kind in POOLS.items()]


def _applied(client: SyncPrefectClient, name: str, kind: str) -> str:
    template = json.loads(TEMPLATES[kind].read_text()) if kind in TEMPLATES else ProcessWorker.get_default_base_job_template()
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
        return "made"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    return "kept"


def main() -> int:
    """Apply all pools to the configured server; return the exit code."""
    with get_client(sync_client=True) as client:
        say("\n".join(apply(client)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
