"""P8: rollouts per second of our asynchronous loop against the lock-step pattern, same engine, same real retriever service.

Scripted engine: turns of lognormal length (mean 110 tokens, sigma 0.6), one to five turns an episode, and a token step of
12 ms + 0.06 ms a sequence decoded at once. With a workspace
whose index and policy stand (`BENCH_WORKSPACE`, default: the checkout), also vLLM on CPU serving that policy, sampled; its note says how
much CPU time each process takes for a rollout and how many steps the engine makes in a round, for both patterns.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from benchmarks.duel import Duel, alternate
from benchmarks.peers import lockstep
from research_rl.config import Config, load, load_profile, located
from research_rl.episode.agent import Completion, Limits, run_episode
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.paths import CHECKOUT
from research_rl.pipeline.run import current, run_stage
from research_rl.pipeline.stages import Workspace
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Endpoint
from research_rl.retriever.client import RetrieverClient
from research_rl.retriever.command import running as retriever_running

MEAN_TOKENS, SIGMA, MOST_TURNS = 110, 0.6, 5
STEP_S, STEP_PER_SEQUENCE_S = 0.012, 0.00006
KNOWLEDGE = ("download", "validate", "corpus", "embed", "index")
EOS = 0


class Bytes:
    """One token a byte."""

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 1 for token in ids if token != EOS).decode(errors="replace")


class ScriptedEngine:
    """Decodes what a script says as fast as the decode law allows for the sequences in flight."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._turn: dict[int, int] = {}
        self._left: dict[int, float] = {}
        self._done: dict[int, asyncio.Event] = {}
        self._news = asyncio.Event()
        self._clock = asyncio.create_task(self._decode())

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        """Return the next turn of the episode that `prompt_ids[0]` numbers."""
        number = prompt_ids[0]
        turn = self._turn[number] = self._turn.get(number, 0) + 1
        text, last = self._text(number, turn)
        ids = (*Bytes().encode(text), EOS) if last else tuple(Bytes().encode(text))
        self._left[number], self._done[number] = len(ids), asyncio.Event()
        self._news.set()
        await self._done[number].wait()
        return Completion(ids, (0.0,) * len(ids), "eos" if last else "stop")

    def close(self) -> None:
        """Stop the clock."""
        self._clock.cancel()

    def _text(self, number: int, turn: int) -> tuple[str, bool]:
        draw = random.Random(f"{self._seed}-{number}-{turn}")
        last = turn == 1 + random.Random(f"{self._seed}-{number}").randrange(MOST_TURNS)
        end = "<answer>\\boxed{a}</answer>" if last else f"<search>town {self._seed} {number} {turn}</search>"
        length = int(draw.lognormvariate(0, SIGMA) * MEAN_TOKENS / 2.718281828 ** (SIGMA**2 / 2))
        return "a" * max(0, length - len(end)) + end, last

    async def _decode(self) -> None:
        while True:
            self._news.clear()
            step = STEP_S + STEP_PER_SEQUENCE_S * len(self._left)
            started = time.perf_counter()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), step * min(self._left.values()) if self._left else None)
            for number in list(self._left):
                self._left[number] -= (time.perf_counter() - started) / step
                if self._left[number] <= 0:
                    del self._left[number]
                    self._done[number].set()


def run(quick: bool) -> Iterator[Duel]:
    """Yield the scripted duels and, where a policy stands, the one on vLLM."""
    rounds = 3 if quick else 5
    with tempfile.TemporaryDirectory() as folder, ExitStack() as services:
        config = load_profile("laptop")
        workspace = Workspace(Path(folder))
        for stage in KNOWLEDGE:
            run_stage(stage, config, workspace)
        retriever = services.enter_context(retriever_running(config, workspace))
        for episodes in (64,) if quick else (64, 256):
            what = f"{episodes} episodes, scripted engine"
            seeds = iter(range(10**6))
            ours, peer = (_scripted(play, retriever, episodes, seeds) for play in (_ours, _lockstep))
            yield alternate("P8", what, "rollouts/s", ours, peer, 1.5, rounds)
    yield from _served(rounds)


def _scripted(play: Callable[..., Awaitable[None]], retriever: Endpoint, episodes: int, seeds: Iterator[int]) -> Callable[[], float]:
    limits = Limits(top_k=3, max_searches=MOST_TURNS, max_result_tokens=256, max_response_tokens=8192, wall_s=600, search_timeout_s=60)

    async def once() -> float:
        engine = ScriptedEngine(next(seeds))
        async with RetrieverClient(retriever.url, token=retriever.token, timeout_s=60) as client:
            started = time.perf_counter()
            await play([(number, 1) for number in range(episodes)], engine, client, Bytes(), limits)
            seconds = time.perf_counter() - started
        engine.close()
        return episodes / seconds

    return lambda: asyncio.run(once())


async def _ours(prompts: Sequence[Sequence[int]], *parts: object) -> None:
    await asyncio.gather(*(run_episode(prompt, *parts) for prompt in prompts))  # type: ignore[arg-type]


async def _lockstep(prompts: Sequence[Sequence[int]], *parts: object) -> None:
    await lockstep.play(prompts, *parts)  # type: ignore[arg-type]


def _served(rounds: int) -> Iterator[Duel]:
    """Yield the duel on a real engine, if a policy stands to be served."""
    workspace = Workspace(Path(os.environ.get("BENCH_WORKSPACE", CHECKOUT)).resolve())
    if not (workspace.root / "params.yaml").is_file():
        return
    config = load(workspace.root / "params.yaml")
    if not all(current(stage, config, workspace) for stage in ("policy", "prepare", "index")):
        return
    from research_rl.serving.serve import running as model_running

    with ExitStack() as services:
        retriever = services.enter_context(retriever_running(config, workspace))
        model = services.enter_context(model_running(config, workspace, workspace.folder("policy"), name="bench-model"))
        seeds = iter(range(10**6))
        costs = Costs(model), Costs(model)
        ours, peer = (
            _on_vllm(play, config, workspace, retriever, model, seeds, cost) for play, cost in zip((_ours, _lockstep), costs, strict=True)
        )
        duel = alternate("P8", "64 episodes, vLLM on CPU, tiny policy", "rollouts/s", ours, peer, 1.0, rounds)
        yield replace(duel, note=f"ours: {costs[0]}; lock-step: {costs[1]}")


class Costs:
    """What a pattern's rounds cost after the first, which warms up: CPU time by process, and steps of the engine."""

    def __init__(self, model: Endpoint) -> None:
        self._model = model
        self._rounds = self._rollouts = 0
        self._spent = defaultdict[str, float](float)
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        """Note where every counter stands."""
        self._before = self._counters()

    def end(self, rollouts: int) -> None:
        """Add what a round took."""
        self._rounds += 1
        if self._rounds > 1:
            now = self._counters()
            for name, count in now.items():
                self._spent[name] += count - self._before.get(name, 0.0)
            self._rollouts += rollouts

    def __str__(self) -> str:
        if not self._rollouts:
            return "not measured in one round"
        steps = self._spent.pop("engine steps")
        times = ", ".join(f"{name} {1000 * seconds / self._rollouts:.1f}" for name, seconds in sorted(self._spent.items()))
        return f"CPU ms a rollout {times}; {steps / (self._rounds - 1):.0f} engine steps a round"

    def _counters(self) -> dict[str, float]:
        seconds = defaultdict[str, float](float, episodes=time.process_time())
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times, command = process.cpu_times(), " ".join(process.cmdline())
                name = "engine" if "EngineCore" in command else "retriever" if "retriever" in command else "model server"
                seconds[name] += times.user + times.system
        text = httpx.get(f"{self._model.url}/metrics", timeout=60, **httpx_options()).text
        steps = [line for line in text.splitlines() if line.startswith("vllm:iteration_tokens_total_count")]
        seconds["engine steps"] = sum(float(line.rpartition(" ")[2]) for line in steps)
        return seconds


def _on_vllm(
    play: Callable[..., Awaitable[None]],
    config: Config,
    workspace: Workspace,
    retriever: Endpoint,
    model: Endpoint,
    seeds: Iterator[int],
    costs: Costs,
) -> Callable[[], float]:
    from research_rl.evaluation.results import read_questions
    from research_rl.serving.client import HttpEngine, Sampling

    tokenizer = FolderTokenizer(workspace.folder("policy"))
    questions = read_questions(workspace.folder("prepare") / "test.parquet", 64)
    prompt = located(config, workspace.root).prompt
    prompts = [encode_prompt(tokenizer, question.question, prompt) for question in questions]

    async def once() -> float:
        async with AsyncExitStack() as clients:
            # Each round draws anew, so that no side finds the other's prefixes in the engine's cache.
            engine = await clients.enter_async_context(HttpEngine(model, Sampling(1.0, next(seeds)), connections=64))
            searcher = await clients.enter_async_context(RetrieverClient(retriever.url, token=retriever.token))
            costs.begin()
            started = time.perf_counter()
            await play(prompts, engine, searcher, tokenizer, Limits(**config.episode.model_dump()))
            seconds = time.perf_counter() - started
            costs.end(len(prompts))
            return len(prompts) / seconds

    return lambda: asyncio.run(once())
