"""Flow research-train: the whole chain, from the source of the data to the evaluation of the trained policy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from research_rl.errors import ResearchError
from research_rl.pipeline.stages import Workspace
from research_rl.report.closing import closing
from research_rl.terminal import take_any_text
from tasks.download import download
from tasks.evaluate import baseline, evaluate, report
from tasks.forms import Profile, StageName
from tasks.index import corpus, embed, index
from tasks.job import assignments, flow_run_name, opened, resolve, stop_services
from tasks.local.server import served
from tasks.policy import policy
from tasks.prepare import prepare
from tasks.preview import preview
from tasks.retriever import retriever
from tasks.summary import summary
from tasks.train import export, train
from tasks.validate import validate
from tasks.versioning.commit import commit

__all__ = ["research_train"]


@flow(
    name="research-train",
    flow_run_name=flow_run_name,
    on_failure=[stop_services],
    on_cancellation=[stop_services],
    on_crashed=[stop_services],
    log_prints=True,
)
def research_train(
    workspace: str = ".",
    profile: Profile | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006
    force: list[StageName] = [],  # noqa: B006
    dry_run: bool = False,
) -> None:
    """Build data, index and initial policy, train it by GRPO with search in the rollout, and evaluate it before and after.

    Finished stages are skipped; an interrupted training goes on from its last complete step.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        profile: Profile to start from (laptop, smollm, paper-7b, paper-32b, ...); empty keeps the workspace's params.yaml.
        overrides: Parameters by dotted name, for example {"train.steps": 40}; written to params.yaml.
        force: Stages to build even when nothing changed.
        dry_run: Only show the resolved configuration, the plan, and how it differs from the paper; build nothing.
    """
    if dry_run:
        preview(workspace, profile, overrides)
        return
    with opened(workspace, profile, overrides, flow=str(flow_run.flow_name), run_id=str(flow_run.id), force=frozenset(force)) as job:
        # The longest stage that needs no data: it runs beside download, corpus, embed and index.
        initial = job.submit(policy)
        raw = download(job)
        checked = validate(job, wait_for=[raw])
        questions = job.submit(prepare, raw, checked)
        passages = corpus(job, wait_for=[raw, checked])
        vectors = embed(job, wait_for=[passages])
        searchable = index(job, wait_for=[passages, vectors])
        parents = [questions.result(), initial.result(), searchable]
        with retriever(job, ("baseline", "train", "evaluate")) as searching:
            before = baseline(searching, wait_for=parents)
            trained = train(searching, wait_for=parents)
            exported = export(searching, wait_for=[trained])
            after = evaluate(searching, wait_for=[exported, *parents])
        compared = report(job, wait_for=[trained, before, after])
        commit(job, wait_for=[compared])
        summary(job, wait_for=[compared])


def main(arguments: list[str]) -> int:
    """Run the flow in this folder with `section.key=value` arguments; return the exit code."""
    take_any_text()
    parser = argparse.ArgumentParser("flows.train", description="Build, train and evaluate in this folder.")
    parser.add_argument("-p", "--profile", help="profile to start from; this folder's params.yaml when left out")
    parser.add_argument("--dry-run", action="store_true", help="only show the resolved run, its plan and how it differs from the paper")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="parameters for this run")
    # Parameters may stand between options.
    options = parser.parse_intermixed_args(arguments)
    try:
        overrides = assignments(options.overrides)
        # Wrong parameters are refused before a server is started for the run.
        resolve(Path(), options.profile, overrides)
        with served():
            research_train(profile=options.profile, overrides=overrides, dry_run=options.dry_run)
        if not options.dry_run:
            print("\n".join(closing(Workspace(Path().resolve()))))
    except ResearchError as error:
        print(f"research-train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
