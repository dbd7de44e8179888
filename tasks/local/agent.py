"""Task agent: leave the trained policy answering questions when a run has ended. Starts a deployment; serves nothing itself."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from research_rl.errors import ConfigError
from tasks.job import Job
from tasks.local.keeper import is_kept

__all__ = ["agent", "require_deployment"]

DEPLOYMENT = "research-serve/agent"


def require_deployment() -> None:
    """Raise ConfigError where this Prefect server has no deployment that keeps an agent up: before the training, not after it."""
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise ConfigError(
                f"then_serve=true: this Prefect server has no deployment {DEPLOYMENT}; `make up` makes it, or leave then_serve out and "
                "run `research serve-agent` afterwards"
            ) from None


@task(name="agent", task_run_name="agent", cache_policy=NO_CACHE, persist_result=False)
def agent(job: Job) -> State[None]:
    """Start `research-serve/agent` for this workspace, unless one is up, which looks for the newest model by itself."""
    if is_kept(job.workspace):
        return Completed(message="an agent is kept up for this workspace; with agent.model=after it starts again with the new policy")
    # Typed as if it were always awaited.
    run: Any = run_deployment(DEPLOYMENT, parameters={"workspace": str(job.workspace.root)}, timeout=0, as_subflow=False)
    return Completed(message=f"{DEPLOYMENT} goes on as {run.name}; its artifact `agent` says where it answers")
