"""Flow research-serve: a retriever, or the whole agent, that stays up until the run is cancelled."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow

from research_rl.pipeline.stages import Workspace
from tasks.job import flow_run_name, folder_of, resolve
from tasks.local.keeper import keep, keep_agent, stop_serving
from tasks.local.server import server

__all__ = ["research_serve"]


@flow(
    name="research-serve",
    flow_run_name=flow_run_name,
    on_failure=[stop_serving],
    on_cancellation=[stop_serving],
    on_crashed=[stop_serving],
    log_prints=True,
)
def research_serve(
    workspace: str = ".",
    overrides: dict[str, Any] = {},  # noqa: B006
    part: str = "1/1",
    service: Literal["retriever", "agent"] = "retriever",
) -> None:
    """Serve over HTTP; watch the service, start it again when it ends, fails its health checks, or what it serves is built anew.

    Runs until it is cancelled. The artifact `retriever` or `agent` says where it answers. Training in the same workspace goes on beside
    it: set retriever.url to the address to use a retriever there.

    Args:
        workspace: Folder with params.yaml and artifacts/; relative to the checkout.
        overrides: Parameters by dotted name, for example {"retriever.port": 8080}; params.yaml stays as it is.
        part: Which part of the index to serve, as i/n; for the retriever.
        service: The retriever of the workspace's index, or the agent: the trained policy with search.
    """
    # No lock: training in the same workspace goes on beside it.
    root = folder_of(workspace)
    config = resolve(root, None, overrides)
    if service == "agent":
        keep_agent(config, Workspace(root), overrides)
    else:
        keep(config, Workspace(root), part)


if __name__ == "__main__":
    server()
    research_serve()
