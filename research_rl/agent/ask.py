"""Ask the trained policy one question: start what it needs, play one episode, print it. The loop is `episode.agent.run_episode`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from research_rl.config import Config, located
from research_rl.episode.agent import Limits, run_episode
from research_rl.episode.prompts import encode_prompt, load_tokenizer
from research_rl.episode.trajectory import Trajectory
from research_rl.errors import ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.reward.rules import answer, boxed, graded_text

__all__ = ["ask", "transcript"]


def ask(config: Config, workspace: Workspace, question: str, model: Path | None, note: Callable[[str], None]) -> Trajectory:
    """Play one episode with a model folder (the trained policy when None) and the workspace's index.

    `note` hears what takes time. Raises ConfigError for a question that is too long, ServiceError when the model server fails.
    """
    from research_rl.retriever.command import running as retriever_running
    from research_rl.serving.serve import running as model_running

    config = located(config, workspace.root)
    folder = (model or workspace.folder("export")).resolve()
    # Before any service starts: a question that is too long is refused at once.
    prompt = encode_prompt(load_tokenizer(folder), question, config.prompt)
    with ExitStack() as services:
        note("starting the retriever")
        retriever = services.enter_context(retriever_running(config, workspace))
        note("starting the model server")
        served = services.enter_context(model_running(config, workspace, folder, name="ask-model"))
        note("asking")
        trajectory = asyncio.run(_play(config, folder, prompt, served, retriever))
    if trajectory.error:
        raise ServiceError(f"the episode ended with {trajectory.stop.value}: {trajectory.error}; ask again, or look at the server's log")
    return trajectory


async def _play(config: Config, folder: Path, prompt: list[int], served: Endpoint, retriever: Endpoint) -> Trajectory:
    from research_rl.retriever.client import RetrieverClient
    from research_rl.serving.client import HttpEngine, Sampling

    async with AsyncExitStack() as clients:
        sampling = Sampling(config.evaluation.temperature, config.evaluation.seed)
        engine = HttpEngine(served, sampling, engine=config.serving.engine, timeout_s=config.episode.wall_s, connections=1)
        searcher = RetrieverClient(retriever.url, retriever.token, config.episode.search_timeout_s, connections=1)
        await clients.enter_async_context(engine)
        await clients.enter_async_context(searcher)
        return await run_episode(prompt, engine, searcher, load_tokenizer(folder), Limits(**config.episode.model_dump()))


def transcript(trajectory: Trajectory) -> str:
    """Return the episode as text: what the model wrote, what each search brought, and the answer or why there is none."""
    boxed_answer = boxed(answer(graded_text(trajectory.segments)))
    ending = f"no answer: the episode ended with {trajectory.stop.value}" if boxed_answer is None else f"answer: {boxed_answer.strip()}"
    return f"{trajectory.text.strip()}\n\n{ending}"
