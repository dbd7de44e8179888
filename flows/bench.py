"""Flow research-bench: play models by methods on question sets, and say what search adds."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.evaluation.bench import bench
from tasks.forms import merged
from tasks.job import flow_run_name, opened, stop_services
from tasks.local.server import server

__all__ = ["research_bench"]


@flow(
    name="research-bench",
    flow_run_name=flow_run_name,
    on_failure=[stop_services],
    on_cancellation=[stop_services],
    on_crashed=[stop_services],
    log_prints=True,
)
def research_bench(
    workspace: str = ".",
    seed: int | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006
    against: str | None = None,
) -> None:
    """Play the matrix of section bench; a cell that stands is not played again. Needs a finished research-train.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        seed: Seed of sampling and of the intervals, the parameter evaluation.seed; written to params.yaml, whose value stays when this is
            empty.
        overrides: Other parameters by dotted name, for example {"bench.methods": ["research", "closed-book"]}; written to params.yaml. One
            that decides data, index or training is refused.
        against: Also place the results in the bands of a publication's, for example paper.
    """
    only = ("baseline", "evaluate", "report")
    overrides = merged("research-bench", {"overrides": overrides, "seed": seed})
    with opened(workspace, None, overrides, only=only) as job:
        bench(job, against)


if __name__ == "__main__":
    server()
    research_bench()
