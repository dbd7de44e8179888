"""P18: what the agent service takes beside the episodes that it plays: 64 questions at once, the same policy, retriever and model server.

Needs a finished run (`BENCH_WORKSPACE`, default: the checkout). Ours asks `research serve-agent` over HTTP, whole answers; the peer plays
the same questions by the bare episode loop in this process. Counted is the CPU time of every process that answers; of this one only where
it plays the episodes. All answers have to come, and to be those of the bare loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.duel import Duel, alternate
from research_rl.agent.command import Address, recorded_address
from research_rl.config import Config, load, located
from research_rl.episode.agent import Limits, run_episode
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.evaluation.results import read_questions
from research_rl.paths import CHECKOUT, PYTHON
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import Workspace
from research_rl.process import services
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Endpoint
from research_rl.retriever.client import RetrieverClient
from research_rl.retriever.command import running as retriever_running
from research_rl.reward.rules import answer, boxed
from research_rl.serving.client import HttpEngine, Sampling
from research_rl.serving.serve import running as model_running

QUESTIONS = 64
GOAL = 0.95
"""Questions a CPU-second against the bare loop's: below it the service takes more than a twentieth."""


@dataclass(frozen=True)
class Bench:
    """The servers that both sides use, and the questions."""

    config: Config
    workspace: Workspace
    retriever: Endpoint
    model: Endpoint
    questions: Sequence[str]


def run(quick: bool) -> Generator[Duel]:
    """Yield the duel where a finished run stands, nothing elsewhere."""
    workspace = Workspace(Path(os.environ.get("BENCH_WORKSPACE", CHECKOUT)).resolve())
    if not (workspace.root / "params.yaml").is_file():
        return
    config = located(load(workspace.root / "params.yaml"), workspace.root)
    if not all(current(stage, config, workspace) for stage in ("export", "prepare", "index")):
        return
    questions = [each.question for each in read_questions(workspace.folder("prepare") / "test.parquet", QUESTIONS)]
    with ExitStack() as stack:
        retriever = stack.enter_context(retriever_running(config, workspace))
        model = stack.enter_context(model_running(config, workspace, workspace.folder("export"), name="bench-model"))
        bench = Bench(config, workspace, retriever, model, questions)
        address, process = stack.enter_context(_serving(bench))
        # Opened once, as by the service.
        tokenizer = FolderTokenizer(workspace.folder("export"))
        answers = list[list[str]]()
        ours = _side(lambda: asyncio.run(_asked(bench, address)), answers, process, own=False)
        peer = _side(lambda: asyncio.run(_played(bench, tokenizer)), answers, process, own=True)
        what = f"{QUESTIONS} questions at once by the agent service, and by the bare loop"
        yield alternate("P18", what, "questions a CPU-second", ours, peer, GOAL, 3 if quick else 7)
        # Sampling is greedy; batches of another composition may still turn a close call the other way.
        same = sum(a == b for a, b in zip(*answers[-2:], strict=True))
        assert same >= 0.95 * len(questions), f"{len(questions) - same} of {len(questions)} answers differ"


@contextmanager
def _serving(bench: Bench) -> Generator[tuple[Address, psutil.Process]]:
    """Yield address and process of an agent service over the given servers."""
    given = [f"retriever.url={bench.retriever.url}", f"serving.url={bench.model.url}/v1", f"agent.concurrency={QUESTIONS}"]
    command = [PYTHON, "-m", "research_rl", "serve-agent", "--workspace", str(bench.workspace.root), *given]
    tokens = {"RESEARCH_SERVING_TOKEN": bench.model.token or "", "RESEARCH_RETRIEVER_TOKEN": bench.retriever.token or ""}
    process = services.spawn("bench-agent", command, folder=bench.workspace.services, env=tokens, cwd=CHECKOUT)
    try:
        deadline = time.monotonic() + 600
        while not (address := recorded_address(bench.workspace)):
            assert time.monotonic() < deadline and process.popen.poll() is None, process.tail(20)
            time.sleep(0.2)
        services.wait_healthy(process, f"{address.url}/readyz", 600)
        (found,) = [each for each in psutil.Process(process.popen.pid).children(recursive=True) if "serve-agent" in each.cmdline()][:1]
        yield address, found
    finally:
        process.stop()


def _side(give: Callable[[], list[str]], answers: list[list[str]], service: psutil.Process, *, own: bool) -> Callable[[], float]:
    def once() -> float:
        before = _cpu(service, own)
        answers.append(give())
        return QUESTIONS / (_cpu(service, own) - before)

    return once


def _cpu(service: psutil.Process, own: bool) -> float:
    """Return the CPU seconds of all that answers: the servers, and the agent service or (`own`) this process."""
    counted = {process for process in psutil.Process().children(recursive=True) if own is False or process.pid != service.pid}
    times = [process.cpu_times() for process in counted]
    return sum(each.user + each.system for each in times) + (time.process_time() if own else 0.0)


async def _asked(bench: Bench, address: Address) -> list[str]:
    headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
    async with httpx.AsyncClient(headers=headers, timeout=600, limits=httpx.Limits(max_connections=QUESTIONS), **httpx_options()) as client:
        replies = await asyncio.gather(*(client.post(f"{address.url}/v1/responses", json={"input": text}) for text in bench.questions))
    told: list[dict[str, Any]] = [reply.raise_for_status().json() for reply in replies]
    return [str(each["research"]["answer"]).strip() for each in told]


async def _played(bench: Bench, tokenizer: FolderTokenizer) -> list[str]:
    prompts = [encode_prompt(tokenizer, question, bench.config.prompt) for question in bench.questions]
    limits = Limits(**bench.config.episode.model_dump())
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(HttpEngine(bench.model, Sampling(), connections=QUESTIONS))
        searcher = await stack.enter_async_context(RetrieverClient(bench.retriever.url, token=bench.retriever.token))
        played = await asyncio.gather(*(run_episode(prompt, engine, searcher, tokenizer, limits) for prompt in prompts))
    return [str(boxed(answer(trajectory.text))).strip() for trajectory in played]
