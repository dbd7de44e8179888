# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownParameterType=false
"""verl's agent workers with fewer calls an episode. Named by `agent_loop_manager_class`; plays and grades nothing itself.

Three things that verl does for every episode are done once, or together: making the agent loop, asking the balancer for a
server where only one stands, and handing a finished trajectory to TransferQueue.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import hydra
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient

from research_rl.training.policy_env.outbox import Outbox

__all__ = ["SearchAgentManager"]

# The class below Ray's actor: Ray lets no class inherit from an actor.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class
_Row = tuple[str, dict[str, Any], dict[str, Any]]
# Columns of the data set that the trainer would carry from process to process without a use for them.
_READ_BY_THE_LOOP_ALONE = ("raw_prompt", "extra_info", "tools_kwargs", "interaction_kwargs", "index")


class _OnlyServer(LLMServerClient):
    """Asks the balancer once: with one server there is nothing to balance."""

    _known: Any = None

    async def _acquire_server(self, request_id: str, **extra: Any) -> Any:
        if self._known is None:
            self._known = await super()._acquire_server(request_id, **extra)
        return self._known

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Count nothing."""


class _SearchAgentWorker(_Worker):  # type: ignore[misc]
    """One loop for all episodes of a name; finished trajectories leave together."""

    def __init__(self, config: DictConfig, llm_client: LLMServerClient, *args: Any, **kwargs: Any) -> None:
        client = _OnlyServer(config, llm_client._load_balancer) if _servers(config) == 1 else llm_client
        super().__init__(config, client, *args, **kwargs)
        self._loops: dict[str, AgentLoopBase] = {}
        self._outboxes: dict[str, Outbox[_Row]] = {partition: Outbox(partial(_put, partition)) for partition in ("train", "val")}

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, trace: bool = True, **row: Any
    ) -> None:
        if agent_name not in self._loops:
            self._loops[agent_name] = self._make(agent_name)
        output = await self._loops[agent_name].run(sampling_params, **row)
        partition = "val" if trajectory["validate"] else "train"
        # verl's form of a key: question, rollout, and the number of the loop's output, of which there is one.
        await self._outboxes[partition].put((f"{row['uid']}_{row['session_id']}_0", _fields(output, row), _tag(output, row)))

    def _make(self, name: str) -> AgentLoopBase:
        return hydra.utils.instantiate(
            config=_agent_loop_registry[name],
            trainer_config=DictConfigWrap(self.config),
            server_manager=self.llm_client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            hf_model_type=self.hf_model_type,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
            tools=ToolListWrap(self.tools),
        )


class SearchAgentManager(AgentLoopManagerTQ):
    """verl's manager with the workers of this module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(_SearchAgentWorker)


def _servers(config: DictConfig) -> int:
    rollout = config.actor_rollout_ref.rollout
    return int(config.trainer.nnodes * config.trainer.n_gpus_per_node // rollout.tensor_model_parallel_size)


def _fields(output: AgentLoopOutput, row: dict[str, Any]) -> dict[str, Any]:
    """Return what verl's trainer reads of a trajectory: its ids with positions, masks, log-probabilities, reward and names."""
    fields = output.as_dict() | {name: value for name, value in row.items() if name not in _READ_BY_THE_LOOP_ALONE}
    ids = torch.cat([fields["prompts"], fields["responses"]])
    return fields | {
        "loss_mask": fields["response_mask"],
        "input_ids": ids,
        # Text alone and no padding: positions count up from 0.
        "position_ids": torch.arange(len(ids)),
        "multi_modal_inputs": {},
    }


def _tag(output: AgentLoopOutput, row: dict[str, Any]) -> dict[str, Any]:
    """Return what verl's replay buffer reads: lengths in tokens, and the weights (global steps) that wrote the trajectory."""
    prompt, response = len(output.prompt_ids), len(output.response_ids)
    return {
        "status": "success",
        "prompt_len": prompt,
        "response_len": response,
        "seq_len": prompt + response,
        "global_steps": row["global_steps"],
        "min_global_steps": output.extra_fields["min_global_steps"],
        "max_global_steps": output.extra_fields["max_global_steps"],
    }


async def _put(partition: str, rows: list[_Row]) -> None:
    keys, fields, tags = zip(*rows, strict=True)
    await tq.async_kv_batch_put(keys=list(keys), fields=list_of_dict_to_tensordict(list(fields)), tags=list(tags), partition_id=partition)
