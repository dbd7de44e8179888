"""Flow research-serve: a retriever that stays up until the run is cancelled."""

from __future__ import annotations

from typing import Any

from prefect import flow

from research_rl.pipeline.stages import Workspace
from tasks.job import flow_run_name, folder_of, resolve
from tasks.local.keeper import keep, stop_serving
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
def research_serve(workspace: str = ".", overrides: dict[str, Any] = {}, part: str = "1/1") -> None:  # noqa: B006
    """Serve the workspace's index over HTTP; watch it, start it again when it ends, fails its health checks, or the index is rebuilt.

    Runs until it is cancelled. The artifact `retriever` says where it answers. Training in the same workspace goes on beside it:
    set retriever.url to the address to use it there.

    Args:
        workspace: Folder with params.yaml and artifacts/; relative to the checkout.
        overrides: Parameters by dotted name, for example {"retriever.port": 8080}; params.yaml stays as it is.
        part: Which part of the index to serve, as i/n.
    """
    # No lock: training in the same workspace goes on beside it.
    root = folder_of(workspace)
    keep(resolve(root, None, overrides), Workspace(root), part)


if __name__ == "__main__":
    server()
    research_serve()
