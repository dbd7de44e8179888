"""Runs in the policy environment: what verl's own worker puts into TransferQueue for a trajectory, and what ours puts.

Prints both as JSON: keys, tags, and per field its kind and values.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import torch
import transfer_queue
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

from research_rl.training.policy_env import rollout
from research_rl.training.policy_env.outbox import Outbox

CONFIG = OmegaConf.create(
    {"trainer": {"nnodes": 1, "n_gpus_per_node": 1}, "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}}, "data": {}}
)
ROW = {
    "data_source": "fictional",
    "reward_model": {"ground_truth": {"target": ["ba"]}},
    "extra_info": {"id": "q1", "split": "train", "question": "ab", "index": 0},
    "raw_prompt": [{"role": "user", "content": "ab"}],
    "index": 0,
    "uid": "u1",
    "global_steps": 3,
}
put: list[dict[str, Any]] = []
made: list[int] = []


async def keep(keys: list[str], fields: Any, tags: list[dict[str, Any]], partition_id: str) -> None:
    """Stand in for TransferQueue: keep what was put, one row at a time."""
    await asyncio.sleep(0.01)
    names = list(fields.keys())
    rows = [{name: shown(fields[name][i]) for name in names} for i in range(len(keys))]
    put.append({"keys": keys, "tags": tags, "partition": partition_id, "rows": rows})


def shown(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    return json.loads(json.dumps(getattr(value, "data", value)))


def trajectory(number: int) -> AgentLoopOutput:
    length = 3 + number
    return AgentLoopOutput(
        prompt_ids=[5, 6],
        response_ids=list(range(length)),
        response_mask=[1] * (length - 1) + [0],
        response_logprobs=[-0.5] * length,
        reward_score=0.25 * number,
        num_turns=2,
        metrics=AgentLoopMetrics(generate_sequences=1.0, tool_calls=0.5),
        extra_fields={"min_global_steps": 1, "max_global_steps": 2, "reward_extra_info": {"f1": 1.0}},
    )


class Loop:
    """An agent loop that is done at once."""

    def __init__(self, server_manager: Any, **kwargs: Any) -> None:
        made.append(1)

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        return trajectory(row["session_id"])


class Balancer:
    """Counts how often it is asked for a server."""

    def __init__(self) -> None:
        self.asked = self.told = 0
        self.acquire_server, self.release_server = Remote(self._acquire), Remote(self._release)
        self.require_acquire_fields = self.require_release_fields = Remote(list)

    def _acquire(self, request_id: str) -> tuple[str, str]:
        self.asked += 1
        return "s", "handle"

    def _release(self, server_id: str) -> None:
        self.told += 1


class Remote:
    """A method of a Ray actor."""

    def __init__(self, method: Any) -> None:
        self._method = method

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def worker(cls: Any) -> Any:
    """Return a worker without the start-up of verl's constructor."""
    bare = object.__new__(cls)
    names = {"config": CONFIG, "processor": None, "tokenizer": None, "hf_model_type": None, "dataset_cls": None, "tools": []}
    bare.__dict__.update(names, distillation_enabled=False, reward_loop_worker_handles=None, llm_client=None)
    return bare


async def main() -> None:
    transfer_queue.async_kv_batch_put = keep
    agent_loop._agent_loop_registry["search_agent"] = {"_target_": f"{__name__}.Loop"}
    verls, ours = worker(AgentLoopWorkerTQ.__ray_metadata__.modified_class), worker(rollout._SearchAgentWorker)
    ours._loops = {}
    ours._outboxes = {name: Outbox(partial(rollout._put, name)) for name in ("train", "val")}
    told: dict[str, Any] = {"step": 3, "sample_index": 0, "rollout_n": 0, "validate": False}
    found: dict[str, Any] = {}
    for name, one in (("verl", verls), ("ours", ours)):
        put.clear()
        made.clear()
        for validate in (False, True):
            calls = [
                one._run_agent_loop({}, {**told, "validate": validate}, agent_name="search_agent", trace=False, session_id=i, **ROW)
                for i in range(5)
            ]
            await asyncio.gather(*calls)
        found[name] = {"put": list(put), "made": len(made)}
    balancer = Balancer()
    client = rollout._OnlyServer(CONFIG, balancer)
    servers = [await client._acquire_server(f"r{i}", prompt_ids=[1]) for i in range(4)]
    client._release_server("s")
    found["balancer"] = {"servers": servers, "asked": balancer.asked, "told": balancer.told}
    print(json.dumps(found))


asyncio.run(main())
