"""Runs in the policy environment: drive the agent loop adapter as verl does, with its real base class and a scripted engine.

Arguments: model folder, agent file, folder of episodes. Prints what came back as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.workers.rollout.replica import TokenOutput

from research_rl.episode.prompts import load_tokenizer
from research_rl.training.run import episodes

model, agent_file, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
tokenizer = load_tokenizer(model)
ROW = {
    "data_source": "fictional",
    "reward_model": {"ground_truth": {"target": ["ba"]}},
    "extra_info": {"id": "q1", "split": "train", "question": "ab", "index": 0},
    "raw_prompt": [{"role": "user", "content": "ab"}],
    "uid": "u1",
    "session_id": 0,
    "global_steps": 3,
}


class Client:
    """Answers like verl's server client: ids, log-probabilities, "completed" whatever ended the turn."""

    def __init__(self, turns: list[Any]) -> None:
        self.turns, self.calls = list(turns), []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.calls.append({"request": request_id, "prompt": len(prompt_ids), **sampling_params})
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        ids = turn[: sampling_params["max_tokens"]]
        extra = {"global_steps": 2, "min_global_steps": 2, "max_global_steps": 2}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason="completed", extra_fields=extra)


def text(value: str) -> list[int]:
    return tokenizer.encode(value)


async def play(name: str, turns: list[Any]) -> dict[str, Any]:
    trainer = OmegaConf.create(
        {"actor_rollout_ref": {"model": {"path": str(model)}, "rollout": {"prompt_length": 400, "response_length": 400}}, "data": {}}
    )
    client = Client(turns)
    loop = hydra.utils.instantiate(
        config=OmegaConf.load(agent_file)[0],
        trainer_config=DictConfigWrap(trainer),
        server_manager=client,
        tokenizer=AutoTokenizer.from_pretrained(model),
        processor=None,
        hf_model_type="qwen2",
        dataset_cls=None,
        data_config=DictConfigWrap(trainer.data),
    )
    row = {**ROW, "extra_info": {**ROW["extra_info"], "id": name}}
    out = await loop.run({"temperature": 1.0, "logprobs": True}, **row)
    fields = out.as_dict()
    pairs = list(zip(out.response_ids, out.response_mask, strict=True))
    return {
        "model": tokenizer.decode([token for token, mask in pairs if mask]),
        "search": tokenizer.decode([token for token, mask in pairs if not mask]),
        "lengths": [len(out.response_ids), len(out.response_mask), len(out.response_logprobs or [])],
        "unknown": [logprob for (_, mask), logprob in zip(pairs, out.response_logprobs or [], strict=True) if not mask],
        "reward": [float(fields["rm_scores"].sum()), float(fields["rm_scores"][-1])],
        "turns": out.num_turns,
        "extra": out.extra_fields,
        "calls": client.calls,
    }


async def main() -> None:
    answer = [*text("<think> b </think> <answer> \\boxed{ ba } </answer>"), tokenizer.eos_id]
    search = text("<think> a </think> <search> ab </search>")
    cases = {
        "answered": [search, answer],
        "length": [text("a b " * 400)],
        "broken": [search, RuntimeError("engine is gone")],
        "silent": [RuntimeError("engine is gone")],
    }
    results = {name: await play(name, turns) for name, turns in cases.items()}
    results["kept"] = {
        row["id"]: {"stop": row["stop"], "score": row["score"], "searches": row["searches"]} for row in episodes.gather(folder, 3)
    }
    json.dump(results, sys.stdout)


asyncio.run(main())
