"""Flow research-eval: measure the policy before and after training on the held-out questions."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.evaluation.evaluate import baseline, evaluate, report
from tasks.forms import merged
from tasks.job import flow_run_name, opened, stop_services
from tasks.local.server import server
from tasks.servers import model_server, retriever
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
    seed: int | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Evaluate the policy before and after training and compare the two; needs a finished research-train. What stands is not played again.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        seed: Seed of sampling and of the intervals, the parameter evaluation.seed; written to params.yaml, whose value stays when this is
            empty.
        overrides: Other parameters by dotted name, for example {"evaluation.rows": 512}; written to params.yaml. One that decides data,
            index or training is refused.
    """
    only = ("baseline", "evaluate", "report")
    overrides = merged("research-eval", {"overrides": overrides, "seed": seed})
    with opened(workspace, None, overrides, only=only) as job:
        # Both evaluations search in one retriever, with the same index and cache.
        with retriever(job, ("baseline", "evaluate")) as searching:
            with model_server(searching, "baseline", "policy") as asking:
                before = baseline(asking, wait_for=asking.servers)
            with model_server(searching, "evaluate", "export") as asking:
                after = evaluate(asking, wait_for=asking.servers)
        compared = report(job, wait_for=[before, after])
        commit(job, wait_for=[compared])
        summary(job, wait_for=[compared])


if __name__ == "__main__":
    server()
    research_eval()
