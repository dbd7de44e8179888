# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownParameterType=false
"""verl's agent loop around `research_rl.episode.agent.run_episode`. Turns verl's server client into an Engine and a Trajectory into
verl's output; holds no loop of its own. Runs inside verl's agent workers.

Named by the agent file, not by verl's `@register`: the decorator would run at first import and drop the file's settings.
Invariants: (1) `run` raises nothing for a lost search or a broken engine, so no group is ever dropped for them; (2) the
episodes of a worker share one client, one gate and one limit of episodes in flight.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from research_rl.config import JudgeConfig, PromptConfig, RewardConfig
from research_rl.episode.agent import Completion, Limits, run_episode
from research_rl.episode.prompts import FolderTokenizer, encode_prompt, load_tokenizer
from research_rl.episode.trajectory import Trajectory
from research_rl.process.tokens import token_from
from research_rl.retriever import TOKEN
from research_rl.retriever.gate import Patience, PauseGate
from research_rl.retriever.source import SearchClient, Taping, opened
from research_rl.reward.grader import Grader, GradingTarget
from research_rl.reward.rules import Grade
from research_rl.training.run import episodes, pauses

__all__ = ["SearchAgentLoop", "VerlEngine", "eos_ids"]


@dataclass(frozen=True)
class _Shared:
    """What all episodes of this process share."""

    tokenizer: FolderTokenizer
    eos: frozenset[int]
    prompt: PromptConfig
    limits: Limits
    episodes: Path
    stopping: Mapping[str, Any]
    grader: Grader
    client: SearchClient
    gate: PauseGate
    turns: asyncio.Semaphore


class VerlEngine:
    """An Engine over verl's server client; one per episode, so that its turns share a server and its prefix cache.

    `versions` holds the oldest and the newest weights (global steps) that wrote a turn.
    """

    def __init__(self, client: Any, tokenizer: FolderTokenizer, eos: frozenset[int], sampling: Mapping[str, Any]) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._eos = eos
        self._sampling = dict(sampling)
        self._request_id = uuid4().hex
        self.versions: list[int] = []

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        """Continue `prompt_ids`; ids and log-probabilities come back as the engine sampled them."""
        sampling = {**self._sampling, "stop": list(stop), "max_tokens": max_tokens}
        output = await self._client.generate(request_id=self._request_id, prompt_ids=list(prompt_ids), sampling_params=sampling)
        self.versions += [
            v for v in (output.extra_fields.get("min_global_steps"), output.extra_fields.get("max_global_steps")) if v is not None
        ]
        ids = tuple(output.token_ids)
        text = self._tokenizer.decode(ids)
        return Completion(ids, tuple(output.log_probs or (0.0,) * len(ids)), self._finished_by(ids, text, stop), text)

    def _finished_by(self, ids: Sequence[int], text: str, stop: Sequence[str]) -> Literal["stop", "eos", "length"]:
        """verl reports "completed" for a stop string and for the length limit alike, so what was written decides."""
        if ids and ids[-1] in self._eos:
            return "eos"
        return "stop" if any(string in text for string in stop) else "length"


class SearchAgentLoop(AgentLoopBase):
    """One reason-with-search episode per call, graded where it was played. `settings` is JSON from the agent file."""

    def __init__(self, *args: Any, settings: str, **kwargs: Any) -> None:
        # A model type would select a chat-message builder, which refuses vocabularies without its family's tokens; episodes need none.
        super().__init__(*args, **{**kwargs, "hf_model_type": None})
        self._shared = _shared(settings, str(self.config.actor_rollout_ref.model.path))

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Play and grade one episode of a dataset row; return ids, mask, log-probabilities and reward."""
        shared = self._shared
        engine = VerlEngine(self.server_manager, shared.tokenizer, shared.eos, {**sampling_params, **shared.stopping})
        prompt_ids = encode_prompt(shared.tokenizer, question(row), shared.prompt)
        # Grading is outside: a judge may take seconds, in which another episode can use the engine.
        async with shared.turns:
            trajectory = await run_episode(prompt_ids, engine, shared.client, shared.tokenizer, shared.limits, shared.gate)
        graded = await shared.grader.grade(trajectory, case(row))
        self._keep(row, trajectory, graded)
        # Without a turn no weights wrote it; it counts as of those in use, which the step before made.
        return _output(trajectory, graded, engine.versions or [int(row["global_steps"]) - 1], shared.tokenizer.eos_id)

    def _keep(self, row: Mapping[str, Any], trajectory: Trajectory, graded: Grade) -> None:
        info: Mapping[str, Any] = row["extra_info"]
        step = int(row["global_steps"])
        names = {
            "step": step,
            "id": str(info["id"]),
            "uid": str(row["uid"]),
            "rollout": int(row["session_id"]),
            "data_source": str(row["data_source"]),
            "question": question(row),
            "golds": golds(row),
        }
        episodes.append(
            self._shared.episodes,
            step,
            str(info["split"]),
            {**names, **episodes.record(trajectory, graded), "client": self._shared.client.take_counts()},
        )


_STOPPING: dict[str, dict[str, Any]] = {
    # Tags may be special tokens of a vocabulary; the engine must see them to stop at one.
    "vllm": {"include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False},
    "sglang": {"no_stop_trim": True, "skip_special_tokens": False, "spaces_between_special_tokens": False},
}


def question(row: Mapping[str, Any]) -> str:
    """Return a row's question."""
    return str(row["extra_info"]["question"])


def golds(row: Mapping[str, Any]) -> list[str]:
    """Return a row's gold answers."""
    return [str(answer) for answer in row["reward_model"]["ground_truth"]["target"]]


def case(row: Mapping[str, Any]) -> GradingTarget:
    """Return what a row's episodes are graded against."""
    supporting = row["extra_info"].get("supporting_passage_ids")
    # A list column may come as an array, which has no truth value, hence the comparison with None.
    return GradingTarget(
        question(row), tuple(golds(row)), tuple(str(passage) for passage in (supporting if supporting is not None else ()))
    )


def eos_ids(model: Path, tokenizer: FolderTokenizer) -> frozenset[int]:
    """Return every id that ends a turn: the tokenizer's, and those of generation_config.json, at which engines stop too."""
    path = model / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return frozenset({tokenizer.eos_id, *(named if isinstance(named, list) else [named] if named is not None else [])})


@lru_cache(maxsize=4)
def _shared(settings: str, model: str) -> _Shared:
    """Return what this process's episodes share: verl makes a loop per episode, and reading all this takes longer than a turn."""
    values, tokenizer = json.loads(settings), load_tokenizer(Path(model))
    limits = Limits(**values["limits"])
    taping = Taping.from_json(values["tape"]) if values["tape"] else None
    client = opened(values["retriever_url"], token_from(TOKEN), limits.search_timeout_s, values["in_flight"], taping)
    return _Shared(
        tokenizer,
        eos_ids(Path(model), tokenizer),
        PromptConfig(**values["prompt"]),
        limits,
        Path(values["episodes"]),
        _STOPPING[values["engine"]],
        Grader(RewardConfig(**values["reward"]), JudgeConfig(**values["judge"]), tokenizer.eos_token),
        client,
        PauseGate(client.works, Patience(**values["patience"]), partial(pauses.append, Path(values["pauses"]))),
        asyncio.Semaphore(values["in_flight"]),
    )


def _output(trajectory: Trajectory, graded: Grade, versions: Sequence[int], eos_id: int) -> AgentLoopOutput:
    """Return verl's view of a trajectory. An empty response becomes one masked token: verl needs a place for the reward."""
    ids, mask, logprobs = trajectory.response_ids, trajectory.response_mask, trajectory.response_logprobs
    if not ids:
        ids, mask, logprobs = [eos_id], [0], [0.0]
    return AgentLoopOutput(
        prompt_ids=list(trajectory.prompt_ids),
        response_ids=ids,
        response_mask=mask,
        response_logprobs=logprobs,
        reward_score=graded.score,
        num_turns=1 + len(trajectory.segments),
        metrics=AgentLoopMetrics(generate_sequences=trajectory.engine_seconds, tool_calls=trajectory.search_seconds),
        extra_fields={
            "min_global_steps": min(versions),
            "max_global_steps": max(versions),
            "reward_extra_info": {
                "f1": graded.f1,
                "em": graded.em,
                "format": float(graded.format_ok),
                "searches": float(len(trajectory.searches)),
            },
        },
    )
