"""Flow research-data: from the source to a searchable index."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.download import download
from tasks.forms import Profile, StageName
from tasks.index import corpus, embed, index
from tasks.job import flow_run_name, opened, stop_services
from tasks.local.server import server
from tasks.prepare import prepare
from tasks.summary import summary
from tasks.validate import validate
from tasks.versioning.commit import commit

__all__ = ["research_data"]


@flow(
    name="research-data",
    flow_run_name=flow_run_name,
    on_failure=[stop_services],
    on_cancellation=[stop_services],
    on_crashed=[stop_services],
    log_prints=True,
)
def research_data(
    workspace: str = ".",
    profile: Profile | None = None,
    # Prefect makes a deployment's form from type and default; nothing writes to the mapping.
    overrides: dict[str, Any] = {},  # noqa: B006
    force: list[StageName] = [],  # noqa: B006
    refresh: bool = False,
) -> None:
    """Download, validate and prepare the questions; store, encode and index the passages; commit to DVC.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        profile: Profile to start from (laptop, smollm, paper-7b, paper-32b); empty keeps the workspace's params.yaml.
        overrides: Parameters by dotted name, for example {"data.generated.entities": 800}; written to params.yaml.
        force: Stages to build even when nothing changed.
        refresh: Ask the sources whether their files changed, and fetch them again where they did; how far the data moved is then measured.
            Where they hold nothing new, and what was built stands, the run ends with that.
    """
    with opened(workspace, profile, overrides, force=force, refresh=refresh) as job:
        finished = [raw := download(job)]
        if not (refresh and job.stands("validate", "prepare", "corpus", "embed", "index")):
            checked = validate(job, wait_for=[raw])
            # Beside the passages: preparing the questions needs no corpus.
            questions = job.submit(prepare, raw, checked)
            passages = corpus(job, wait_for=[raw, checked])
            vectors = embed(job, wait_for=[passages])
            searchable = index(job, wait_for=[passages, vectors])
            finished = [questions.result(), searchable]
        commit(job, wait_for=finished)
        summary(job, wait_for=finished)


if __name__ == "__main__":
    server()
    research_data()
