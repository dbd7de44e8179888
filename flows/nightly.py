"""Flow research-eval, every night: measure the policy in service on the held-out questions and say when it falls."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.evaluation.gate import ask_standing
from tasks.evaluation.night import absent, night
from tasks.job import flow_run_name, opened, stop_services
from tasks.local.server import server

__all__ = ["research_nightly"]


@flow(
    name="research-eval",
    flow_run_name=flow_run_name,
    on_failure=[stop_services],
    on_cancellation=[stop_services],
    on_crashed=[stop_services],
    log_prints=True,
)
def research_nightly(workspace: str = ".", accept: bool = False) -> State[list[str]] | None:
    """Measure the champion, or the trained policy where none is, on the present index, and compare it with the last accepted night.

    params.yaml is not changed, and a night whose model, questions, index and protocol were measured before is not measured again. Where
    nothing was trained and nobody is champion, the run ends with that.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        accept: Let later nights be compared with this one even when it fell, or could not be compared itself.
    """
    if reason := absent(workspace):
        return Completed(name="Skipped", message=reason, data=[])
    with opened(workspace, None, {}, writes=False) as job:
        ask_standing(job)
        night(job, accept)
    return None


if __name__ == "__main__":
    server()
    research_nightly()
