"""Stages baseline and evaluate: play every held-out question with a served policy and measure it. Knows engine, searcher and
files; leaves the episode to `agent` and the numbers to `summary`.

Invariants: (1) a lost episode costs its own question alone and stays in the denominator; (2) past
`evaluation.max_failures` lost questions nothing is published; (3) a killed evaluation repeats only unfinished questions; (4) nothing
is published before the retriever that answered was compared, after the last question, with the workspace's index.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from research_rl.config import Config, located, parameters
from research_rl.config.redact import redact_tree
from research_rl.episode.agent import Engine, Limits, Searcher, run_episode
from research_rl.episode.prompts import FolderTokenizer, encode_prompt, load_tokenizer
from research_rl.episode.trajectory import StopReason, Trajectory
from research_rl.errors import ConfigError, ModelError, ServiceError
from research_rl.evaluation.results import HeldOutQuestion, Result, UnfinishedResults, read_questions, to_result, write_results
from research_rl.evaluation.summary import headline, summarise
from research_rl.pipeline.stages import STAGES, Context
from research_rl.process.services import Endpoint
from research_rl.reward.grader import Grader

__all__ = ["evaluate", "run_baseline", "run_trained"]

OnResult = Callable[[Result], None]


def run_baseline(context: Context) -> None:
    """Evaluate the policy before training."""
    _run(context, context.parent("policy"))


def run_trained(context: Context) -> None:
    """Evaluate the policy after training."""
    _run(context, context.parent("export"))


async def evaluate(
    config: Config,
    questions: Sequence[HeldOutQuestion],
    engine: Engine,
    searcher: Searcher,
    tokenizer: FolderTokenizer,
    on_result: OnResult,
) -> list[Result]:
    """Play every question with at most `evaluation.concurrency` episodes in flight; return results in their order.

    Each is graded as training would grade it: by the configured reward, its judge included.
    `on_result` is called for each as it ends. A question whose episode is lost gets a result that says so.
    """
    # Reversed, so that `pop` takes the first.
    waiting = list(reversed(questions))
    done: dict[int, Result] = {}
    async with Grader(config.reward, config.judge, tokenizer.eos_token) as grader:

        async def worker() -> None:
            while waiting:
                # Nothing is awaited between the look at the list and this, so no other worker takes the last question.
                question, started = waiting.pop(), time.perf_counter()
                trajectory = await _trajectory(config, question, engine, searcher, tokenizer)
                seconds = time.perf_counter() - started
                trained = await grader.grade(trajectory, question.target)
                cut_is_empty = config.evaluation.published_limits
                result = to_result(question, trajectory, trained, tokenizer.eos_token, seconds, cut_is_empty=cut_is_empty)
                done[question.row] = result
                on_result(result)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(config.evaluation.concurrency, len(questions))):
                group.create_task(worker())
    return [done[question.row] for question in questions]


async def _trajectory(
    config: Config, question: HeldOutQuestion, engine: Engine, searcher: Searcher, tokenizer: FolderTokenizer
) -> Trajectory:
    try:
        prompt = encode_prompt(tokenizer, question.question, config.prompt)
    except (ConfigError, ModelError) as error:  # one question without a prompt must not end the others
        return Trajectory((), stop=StopReason.ENGINE_FAILURE, error=str(error))
    limits = Limits(**config.episode.model_dump())
    if config.evaluation.published_limits:
        # In the published evaluation the limit is on prompt and response together.
        limits = replace(limits, max_response_tokens=limits.max_response_tokens - len(prompt))
    return await run_episode(prompt, engine, searcher, tokenizer, limits)


def _run(context: Context, model: Path) -> None:
    config = context.config
    questions = read_questions(context.parent("prepare") / "test.parquet", config.evaluation.rows)
    work = context.workspace.work(f"{context.stage.name}-{_key(context)}")
    journal = UnfinishedResults(work / "results.jsonl")
    missing = [question for question in questions if question.row not in journal.results]
    # A process may have ended between its last answer and the comparison of the index.
    compared = work / "compared"
    if missing or not compared.is_file():
        compared.unlink(missing_ok=True)
        _evaluate_served(context, model, missing, journal, len(questions))
        compared.touch()
    results = [journal.results[question.row] for question in questions if question.row in journal.results]
    _publish(context, results)
    # Last: before its publication the journal is all there is of the evaluation.
    shutil.rmtree(work, ignore_errors=True)


def _evaluate_served(context: Context, model: Path, missing: list[HeldOutQuestion], journal: UnfinishedResults, total: int) -> None:
    """Start what is needed, play `missing`, once more what was lost, and keep what is still lost if it is little enough."""
    from research_rl.retriever.command import running as retriever_running
    from research_rl.serving.serve import running as model_running

    config, tokenizer = located(context.config, context.workspace.root), load_tokenizer(model)
    context.progress(f"starting the servers for {len(missing):,} of {total:,} questions", 0.0)

    def note(result: Result) -> None:
        # A lost question is played once more; what is lost then is kept only when it is little enough.
        if not result.lost:
            journal.add(result)
            context.progress(f"{len(journal.results):,} of {total:,} questions", len(journal.results) / total)

    with ExitStack() as services:
        retriever = services.enter_context(retriever_running(config, context.workspace))
        served = services.enter_context(model_running(config, context.workspace, model, name=f"{context.stage.name}-model"))
        results = asyncio.run(_connected(config, missing, served, retriever, tokenizer, note))
        again = [question for question, result in zip(missing, results, strict=True) if result.lost]
        # One more try, after all others: a service that failed may have come back meanwhile.
        lost = [r for r in asyncio.run(_connected(config, again, served, retriever, tokenizer, note)) if r.lost] if again else []
        _require_same_index(context, retriever, journal)
    _accept(lost, total, config.evaluation.max_failures)
    for result in lost:
        journal.add(result)


def _require_same_index(context: Context, retriever: Endpoint, journal: UnfinishedResults) -> None:
    """Forget the answers when a service that was restarted meanwhile serves another index: nobody knows which of them it gave."""
    from research_rl.retriever.command import require_same_index

    try:
        require_same_index(retriever, context.workspace)
    except ServiceError as error:
        journal.forget()
        raise ServiceError(f"{error}; its answers were dropped, so the next run asks every question again") from error


async def _connected(
    config: Config,
    questions: Sequence[HeldOutQuestion],
    served: Endpoint,
    retriever: Endpoint,
    tokenizer: FolderTokenizer,
    on_result: OnResult,
) -> list[Result]:
    from research_rl.retriever.client import RetrieverClient
    from research_rl.serving.client import HttpEngine, Sampling

    evaluation = config.evaluation
    async with AsyncExitStack() as clients:
        sampling = Sampling(evaluation.temperature, evaluation.seed)
        engine = HttpEngine(
            served, sampling, engine=config.serving.engine, timeout_s=config.episode.wall_s, connections=evaluation.concurrency
        )
        searcher = RetrieverClient(retriever.url, retriever.token, config.episode.search_timeout_s, connections=evaluation.concurrency)
        await clients.enter_async_context(engine)
        await clients.enter_async_context(searcher)
        return await evaluate(config, questions, engine, searcher, tokenizer, on_result)


def _accept(lost: Sequence[Result], total: int, limit: float) -> None:
    """Raise ServiceError when more than the share `limit` of the questions says nothing about the policy."""
    if len(lost) <= limit * total:
        return
    reasons = [result.trajectory["error"] or next(s["error"] for s in result.trajectory["searches"] if s["error"]) for result in lost]
    raise ServiceError(
        f"{len(lost)} of {total} questions were lost to failures of the model server or the retriever, evaluation.max_failures={limit:g}; "
        f"the first: {reasons[0]}. Run the stage again: finished questions are kept"
    )


def _publish(context: Context, results: Sequence[Result]) -> None:
    evaluation = context.config.evaluation
    metrics = summarise(results, evaluation.bootstrap, evaluation.seed)
    with context.publish() as staging:
        write_results(staging.path, results)
        _write_json(staging.path / "metrics.json", metrics)
        _write_json(staging.path / "parameters.json", _parameters(context))
        staging.counts |= {"questions": len(results), "lost": sum(result.lost for result in results)}
        staging.facts |= headline(metrics)


def _parameters(context: Context) -> dict[str, Any]:
    """Return the sections that decided this artifact: its own stage's and those of all stages before it."""
    waiting, names, sections = [context.stage.name], set[str](), set[str]()
    while waiting:
        stage = STAGES[waiting.pop()]
        sections.update(stage.sections)
        waiting += [parent for parent in stage.parents if parent not in names]
        names.update(stage.parents)
    return redact_tree(parameters(located(context.config, context.workspace.root), sections))


def _key(context: Context) -> str:
    """Return a name that changes with the parameters and with every parent, so that old unfinished work is never reused."""
    parts = [context.config_hash, *(f"{name}={parent.hash}" for name, parent in sorted(context.parents.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
