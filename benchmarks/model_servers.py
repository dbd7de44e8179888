"""P19: SGLang's server against vLLM's on this machine's CPU, with the trained policy of a finished run.

That run is in `BENCH_WORKSPACE` (default: the checkout). Both are the real servers, started by the commands that the pipeline starts them
with; neither is ours, and no goal is set. Measured are the seconds until the first answer, and the tokens a second of 64 sampled
continuations at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.duel import Duel
from research_rl.config import Config, load, located
from research_rl.episode.agent import Completion
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.evaluation.results import read_questions
from research_rl.paths import CHECKOUT
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving.client import EngineName, HttpEngine, Sampling
from research_rl.serving.serve import running

PROMPTS, TOKENS = 64, 128
NO_GOAL = 0.0


def run(quick: bool) -> Iterator[Duel]:
    """Yield start and throughput where a finished run and both environments stand, nothing elsewhere."""
    workspace = Workspace(Path(os.environ.get("BENCH_WORKSPACE", CHECKOUT)).resolve())
    if not (workspace.root / "params.yaml").is_file():
        return
    config = located(load(workspace.root / "params.yaml"), workspace.root)
    if not all(current(stage, config, workspace) for stage in ("export", "prepare")):
        return
    rounds = 2 if quick else 5
    # In turns, so that both meet the same machine.
    measured = [[_measured(config, workspace, engine) for engine in ("sglang", "vllm")] for _ in range(rounds)]
    starts, rates = ([[each[kind] for each in pair] for pair in measured] for kind in (0, 1))
    sglang, vllm = (median(side) for side in zip(*starts, strict=True))
    yield Duel("P19", "start to the first answer, SGLang against vLLM", "s", sglang, vllm, vllm / sglang, NO_GOAL, rounds)
    sglang, vllm = (median(side) for side in zip(*rates, strict=True))
    what = f"{PROMPTS} continuations of {TOKENS} tokens at once, SGLang against vLLM"
    yield Duel("P19", what, "tokens/s", sglang, vllm, sglang / vllm, NO_GOAL, rounds)


def _measured(config: Config, workspace: Workspace, engine: EngineName) -> tuple[float, float]:
    """Return the seconds from the start to the first answer, and the tokens a second of the continuations after a first round of them."""
    chosen = config.model_copy(update={"serving": config.serving.model_copy(update={"engine": engine})})
    started = time.perf_counter()
    with running(chosen, workspace, workspace.folder("export"), name=f"bench-{engine}") as endpoint:
        asyncio.run(_continued(config, workspace, endpoint, engine, 1, 0))
        start = time.perf_counter() - started
        asyncio.run(_continued(config, workspace, endpoint, engine, PROMPTS, 1))
        began = time.perf_counter()
        made = asyncio.run(_continued(config, workspace, endpoint, engine, PROMPTS, 2))
        return start, sum(len(each.ids) for each in made) / (time.perf_counter() - began)


async def _continued(
    config: Config, workspace: Workspace, endpoint: Endpoint, engine: EngineName, count: int, seed: int
) -> list[Completion]:
    tokenizer = FolderTokenizer(workspace.folder("export"))
    questions = read_questions(workspace.folder("prepare") / "test.parquet", count)
    prompts = [encode_prompt(tokenizer, question.question, config.prompt) for question in questions]
    async with HttpEngine(endpoint, Sampling(1.0, seed), engine=engine, connections=PROMPTS) as client:
        return list(await asyncio.gather(*(client.generate(ids, (), TOKENS) for ids in prompts)))
