"""Flow research-eval: measure the trained policy again on the held-out questions."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from tasks.evaluate import baseline, evaluate, report
from tasks.job import flow_run_name, opened, stop_services
from tasks.local.server import server
from tasks.retriever import retriever
from tasks.summary import summary
from tasks.versioning.commit import commit

__all__ = ["research_eval"]


@flow(
    name="research-eval",
    flow_run_name=flow_run_name,
    on_failure=[stop_services],
    on_cancellation=[stop_services],
    on_crashed=[stop_services],
    log_prints=True,
)
def research_eval(
    workspace: str = ".",
    overrides: dict[str, Any] = {},  # noqa: B006
    again: bool = False,
) -> None:
    """Evaluate the policy before and after training and compare the two; needs a finished research-train.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        overrides: Parameters by dotted name, for example {"evaluation.rows": 512}; written to params.yaml. One that decides data, index or
            training is refused.
        again: Measure even when both evaluations stand.
    """
    force = frozenset({"baseline", "evaluate"} if again else ())
    only = ("baseline", "evaluate", "report")
    with opened(workspace, None, overrides, flow=str(flow_run.flow_name), run_id=str(flow_run.id), force=force, only=only) as job:
        # Both evaluations search in one retriever, with the same index and cache.
        with retriever(job, ("baseline", "evaluate")) as searching:
            before = baseline(searching)
            after = evaluate(searching)
        compared = report(job, wait_for=[before, after])
        commit(job, wait_for=[compared])
        summary(job, wait_for=[compared])


if __name__ == "__main__":
    server()
    research_eval()
