"""Flow research-train: the whole chain, from the source of the data to the evaluation of the trained policy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import flow

from research_rl.errors import ResearchError
from research_rl.pipeline.stages import Workspace
from research_rl.report.closing import closing
from research_rl.terminal import say, take_any_text
from tasks.download import download
from tasks.evaluation.evaluate import baseline, evaluate, report
from tasks.evaluation.gate import ask_standing, conclude, gate
from tasks.forms import Profile, StageName, merged
from tasks.index import corpus, embed, index
from tasks.job import assignments, flow_run_name, opened, resolve, stop_services
from tasks.local.agent import agent, require_deployment
from tasks.local.server import served
from tasks.policy import policy
from tasks.prepare import prepare
from tasks.preview import preview
from tasks.servers import model_server, retriever
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
    steps: int | None = None,
    seed: int | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006
    force: list[StageName] = [],  # noqa: B006
    dry_run: bool = False,
    refresh: bool = False,
    then_serve: bool = False,
) -> None:
    """Build data, index and initial policy, train it by GRPO with search in the rollout, evaluate it before and after, and let it
    meet the champion.

    Finished stages are skipped; an interrupted training goes on from its last complete step.

    Args:
        workspace: Folder with params.yaml, data/ and artifacts/; relative to the checkout.
        profile: Profile to start from (laptop, smollm, paper-7b, paper-32b, ...); empty keeps the workspace's params.yaml.
        steps: Optimizer steps in all, the parameter train.steps; written to params.yaml, whose value stays when this is empty.
        seed: Seed of every random choice that has none of its own (data.seed, train.seed), the parameter seed; written to params.yaml,
            whose value stays when this is empty. Another seed builds data, policy and training anew.
        overrides: Other parameters by dotted name, for example {"train.lr": 0.0001}; written to params.yaml.
        force: Stages to build even when nothing changed.
        dry_run: Only show the resolved configuration, the plan, and how it differs from the paper; build nothing.
        refresh: Ask the sources of the data whether their files changed, and fetch them again where they did.
        then_serve: When all is done, start the deployment research-serve/agent, which keeps the trained policy answering questions.
    """
    overrides = merged("research-train", {"overrides": overrides, "steps": steps, "seed": seed})
    if dry_run:
        preview(workspace, profile, overrides)
        return
    if then_serve:
        require_deployment()
    with opened(workspace, profile, overrides, force=force, refresh=refresh) as job:
        ask_standing(job)
        # The longest stage that needs no data: it runs beside download, corpus, embed and index.
        initial = job.submit(policy)
        raw = download(job)
        checked = validate(job, wait_for=[raw])
        questions = job.submit(prepare, raw, checked)
        passages = corpus(job, wait_for=[raw, checked])
        vectors = embed(job, wait_for=[passages])
        searchable = index(job, wait_for=[passages, vectors])
        parents = [questions.result(), initial.result(), searchable]
        with retriever(job, ("baseline", "train", "evaluate"), parents) as searching:
            with model_server(searching, "baseline", "policy", parents) as asking:
                before = baseline(asking, wait_for=[*parents, *asking.servers])
            trained = train(searching, wait_for=[*parents, *searching.servers])
            exported = export(searching, wait_for=[trained])
            with model_server(searching, "evaluate", "export", [exported]) as asking:
                after = evaluate(asking, wait_for=[exported, *parents, *asking.servers])
        compared = report(job, wait_for=[trained, before, after])
        conclude(job, gate(job, wait_for=[exported, compared]))
        commit(job, wait_for=[compared])
        summary(job, wait_for=[compared])
        if then_serve:
            agent(job, wait_for=[compared])


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
            say("\n".join(closing(Workspace(Path().resolve()))))
    except ResearchError as error:
        say(f"research-train: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
