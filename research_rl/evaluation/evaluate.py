"""Stages baseline and evaluate: play every held-out question with a served policy and measure it. Knows engine, searcher and
files; leaves the episode to `agent` and the numbers to `summary`.

Invariants: (1) a lost episode costs its own question alone and stays in the denominator; (2) past
`evaluation.max_failures` lost questions nothing is published; (3) a killed evaluation repeats only unfinished questions; (4) nothing
is published before the retriever that answered last was compared, after the last question, with the workspace's index.

An evaluation is a measurement: its results hold the seconds that episodes and searches took, for traces and for the question of
cost. So of two evaluations of one policy the scores are equal, where decoding is exact, and the bytes and hashes are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from research_rl.config import Config, located, parameters
from research_rl.config.redact import redact_tree
from research_rl.config.template_text import template_text
from research_rl.corpus.store import PassageStore
from research_rl.episode.agent import Engine, Limits, Searcher
from research_rl.episode.prompts import FolderTokenizer, load_tokenizer
from research_rl.episode.trajectory import Passage
from research_rl.errors import ModelError, ServiceError
from research_rl.evaluation.evidence import Change, unchanged
from research_rl.evaluation.methods import LONGEST_PROMPT, Method, Tools, find
from research_rl.evaluation.results import RECORD, HeldOutQuestion, Result, UnfinishedResults, read_questions, to_result, write_results
from research_rl.evaluation.summary import headline, summarise
from research_rl.pipeline.manifest import Staging
from research_rl.pipeline.stages import Context, Progress, Workspace, deciding
from research_rl.process.services import Endpoint
from research_rl.retriever.source import RetrieverSource, searching
from research_rl.reward.grader import Grader

__all__ = ["PROMPT", "AnswerJournal", "Player", "evaluate", "passages_of", "play_kept", "run_baseline", "run_trained", "write_evaluation"]

PROMPT = "prompt.txt"
"""The file of an evaluation that holds the template of its prompts: the file that it came from may change."""
OnResult = Callable[[Result], None]


class AnswerJournal(Protocol):
    """Answers that outlive a kill, by the row of their question: `results.UnfinishedResults`, or several of them at once."""

    results: dict[int, Result]

    def add(self, result: Result) -> None:
        """Keep one answer."""

    def forget(self) -> None:
        """Drop every answer."""


def run_baseline(context: Context) -> None:
    """Evaluate the policy before training."""
    _run(context, context.parent("policy"))


def run_trained(context: Context) -> None:
    """Evaluate the policy after training."""
    _run(context, context.parent("export"))


@dataclass(frozen=True)
class Player:
    """How questions are played: the configuration, the model's tokenizer, the method, and the seed with which tokens are drawn.

    `passages` finds passages by their ids, for the method that is given the supporting ones. `longest_prompt` is the number of tokens
    that the model server leaves for the prompt of a method with separate calls. `change` is what is done to the passages that
    searches find.
    """

    config: Config
    tokenizer: FolderTokenizer
    method: Method
    seed: int
    passages: Callable[[Sequence[str]], Sequence[Passage]]
    longest_prompt: int = LONGEST_PROMPT
    change: Change = unchanged


async def evaluate(
    player: Player, questions: Sequence[HeldOutQuestion], engine: Engine, searcher: Searcher, on_result: OnResult
) -> list[Result]:
    """Play every question with at most `evaluation.concurrency` episodes in flight; return results in their order.

    Each is graded as training would grade it: by the configured reward, its judge included.
    `on_result` is called for each as it ends. A question whose episode is lost gets a result that says so.
    """
    config = player.config
    limits, published = Limits(**config.episode.model_dump()), config.evaluation.published_limits
    tools = Tools(engine, searcher, player.tokenizer, config.prompt, limits, player.passages, published, player.longest_prompt)
    # Reversed, so that `pop` takes the first.
    waiting = list(reversed(questions))
    done: dict[int, Result] = {}
    async with Grader(config.reward, config.judge, player.tokenizer.eos_token) as grader:

        async def worker() -> None:
            while waiting:
                # Nothing is awaited between the look at the list and this, so no other worker takes the last question.
                question = waiting.pop()
                result = await _play(player, question, tools, grader)
                done[question.row] = result
                on_result(result)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(config.evaluation.concurrency, len(questions))):
                group.create_task(worker())
    return [done[question.row] for question in questions]


async def _play(player: Player, question: HeldOutQuestion, tools: Tools, grader: Grader) -> Result:
    started = time.perf_counter()
    played = await player.method.play(question, replace(tools, searcher=player.change(question, tools.searcher)))
    # Taken before grading, since a judge takes seconds of its own.
    seconds = time.perf_counter() - started
    trained = await grader.grade(played.trajectory, question.target)
    cut_is_empty, eos_token = player.config.evaluation.published_limits, player.tokenizer.eos_token
    return to_result(question, played.trajectory, trained, eos_token, seconds, cut_is_empty=cut_is_empty, prediction=played.prediction)


def _run(context: Context, model: Path) -> None:
    config = context.config
    questions = read_questions(context.parent("prepare") / "test.parquet", config.evaluation.rows, config.evaluation.rows_per_set)
    work = context.workspace.work(f"{context.stage.name}-{_key(context)}")
    journal = UnfinishedResults(work / "results.jsonl")
    # A process may have ended between its last answer and the comparison of the index.
    compared = work / "compared"
    if any(question.row not in journal.results for question in questions) or not compared.is_file():
        compared.unlink(missing_ok=True)
        _evaluate_served(context, model, questions, journal)
        compared.touch()
    results = [journal.results[question.row] for question in questions if question.row in journal.results]
    # What an evaluation says of the policy that stood before is wanted once the new one surprises.
    with context.publish(keep=True) as staging:
        write_evaluation(staging, located(config, context.workspace.root), results, _parameters(context))
    # Last: before its publication the journal is all there is of the evaluation.
    shutil.rmtree(work, ignore_errors=True)


def _evaluate_served(context: Context, model: Path, questions: Sequence[HeldOutQuestion], journal: UnfinishedResults) -> None:
    """Start what is needed and play what `journal` has no result of. Raises ModelError for a model that our prompt cannot be put to."""
    from research_rl.serving.serve import running as model_running

    config = located(context.config, context.workspace.root)
    tokenizer, method = load_tokenizer(model), find("research")
    if refusal := method.refusal(tokenizer, config.prompt, questions):
        raise ModelError(f"{model} cannot be evaluated: {refusal}")
    player = Player(config, tokenizer, method, config.evaluation.seed, passages_of(context.parent("corpus")))
    context.progress(f"starting the servers for {len(questions) - len(journal.results):,} of {len(questions):,} questions", 0.0)
    with ExitStack() as services:
        retriever = services.enter_context(searching(config, context.workspace))
        served = services.enter_context(model_running(config, context.workspace, model, name=f"{context.stage.name}-model"))
        play_kept(player, questions, served, retriever, journal, context.workspace, context.progress)


def play_kept(
    player: Player,
    questions: Sequence[HeldOutQuestion],
    served: Endpoint,
    retriever: RetrieverSource,
    journal: AnswerJournal,
    workspace: Workspace,
    progress: Progress,
    most_lost: float | None = None,
) -> None:
    """Play what `journal` has no result of, once more what was lost, and keep what is still lost if it is little enough.

    Raises ServiceError when more than `most_lost` questions are lost (None: the share `evaluation.max_failures` of these), or when
    the retriever does not serve the workspace's index, and DataError when a tape that is replayed lacks searches.
    """
    from research_rl.retriever.command import standing_index

    # Before the first question: the workspace, and with it a retriever that follows it, may hold another index at the end.
    began = standing_index(workspace)
    missing, total = [question for question in questions if question.row not in journal.results], len(questions)

    def note(result: Result) -> None:
        # A lost question is played once more; what is lost then is kept only when it is little enough.
        if not result.lost:
            journal.add(result)
            progress(f"{len(journal.results):,} of {total:,} questions", len(journal.results) / total)

    results = asyncio.run(_connected(player, missing, served, retriever, note))
    # However few: with a search less the answers would be those of another index.
    retriever.require_complete()
    again = [question for question, result in zip(missing, results, strict=True) if result.lost]
    # One more try, after all others: a service that failed may have come back meanwhile.
    lost = [result for result in asyncio.run(_connected(player, again, served, retriever, note)) if result.lost] if again else []
    retriever.require_complete()
    _require_same_index(workspace, retriever.endpoint, journal, began)
    limit = player.config.evaluation.max_failures
    _accept(lost, total, limit, limit * total if most_lost is None else most_lost)
    for result in lost:
        journal.add(result)


def _require_same_index(workspace: Workspace, retriever: Endpoint, journal: AnswerJournal, began: Mapping[str, str]) -> None:
    """Forget the answers when a service came to another index meanwhile: nobody knows which of them it gave."""
    from research_rl.retriever.command import require_same_index

    try:
        require_same_index(retriever, workspace, began)
    except ServiceError as error:
        journal.forget()
        raise ServiceError(f"{error}; its answers were dropped, so the next run asks every question again") from error


async def _connected(
    player: Player, questions: Sequence[HeldOutQuestion], served: Endpoint, retriever: RetrieverSource, on_result: OnResult
) -> list[Result]:
    from research_rl.serving.client import HttpEngine, Sampling

    config = player.config
    connections = config.evaluation.concurrency
    async with AsyncExitStack() as clients:
        sampling = Sampling(config.evaluation.temperature, player.seed)
        engine = HttpEngine(served, sampling, engine=config.serving.engine, timeout_s=config.episode.wall_s, connections=connections)
        searcher = retriever.client(config.episode.search_timeout_s, connections)
        await clients.enter_async_context(engine)
        await clients.enter_async_context(searcher)
        return await evaluate(player, questions, engine, searcher, on_result)


def passages_of(corpus: Path) -> Callable[[Sequence[str]], list[Passage]]:
    """Return a function that reads passages of a corpus artifact by their ids; an unknown id brings none."""

    # Opened at the first use: most methods read no passage by its id.
    @cache
    def store() -> PassageStore:
        return PassageStore(corpus)

    def passages(identifiers: Sequence[str]) -> list[Passage]:
        return store().get(row for identifier in identifiers if (row := store().row_of(identifier)) is not None)

    return passages


def _accept(lost: Sequence[Result], total: int, limit: float, most: float) -> None:
    """Raise ServiceError when more than `most` questions, which the share `limit` allows, say nothing about the policy."""
    if len(lost) <= most:
        return
    reasons = [result.trajectory["error"] or next(s["error"] for s in result.trajectory["searches"] if s["error"]) for result in lost]
    raise ServiceError(
        f"{len(lost)} of {total} questions were lost to failures of the model server or the retriever, evaluation.max_failures={limit:g}; "
        f"the first: {reasons[0]}. Run the stage again: finished questions are kept"
    )


def write_evaluation(staging: Staging, config: Config, results: Sequence[Result], parameters: Mapping[str, Any]) -> None:
    """Write results, their metrics and what decided them, the text of the prompt included, into an artifact that is being filled."""
    metrics = summarise(results, config.evaluation.bootstrap, config.evaluation.seed)
    # As bytes, exactly as the file holds it: its hash is among the parameters.
    (staging.path / PROMPT).write_bytes(template_text(config.prompt.template, config.prompt.path).encode())
    write_results(staging.path, results)
    _write_json(staging.path / "metrics.json", metrics)
    _write_json(staging.path / "parameters.json", parameters)
    staging.counts |= {"questions": len(results), "lost": sum(result.lost for result in results)}
    staging.facts |= {"record": RECORD, **headline(metrics)}


def _parameters(context: Context) -> dict[str, Any]:
    """Return the sections that decided this artifact: its own stage's and those of all stages before it."""
    return redact_tree(parameters(located(context.config, context.workspace.root), deciding([context.stage.name])))


def _key(context: Context) -> str:
    """Return a name that changes with the parameters and with every parent, so that old unfinished work is never reused."""
    parts = [context.config_hash, *(f"{name}={parent.hash}" for name, parent in sorted(context.parents.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
