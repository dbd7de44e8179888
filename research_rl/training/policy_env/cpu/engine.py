# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
"""verl's FSDP2 engine and vLLM adapter for device "cpu". Importing this module registers both in the training worker."""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from research_rl.training.policy_env.cpu.transfer import private_address

__all__ = ["CpuEngine", "CpuServerAdapter"]


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class CpuEngine(FSDPEngineWithLMHead):
    """FSDP2 on CPU; the reference model is wrapped like the actor."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # verl wraps forward-only models with CPUOffloadPolicy(pin_memory=True), and pinning needs an accelerator.
        config = self.engine_config
        forward_only = config.forward_only
        # verl's configurations refuse to be changed once they are made.
        object.__setattr__(config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(config, "forward_only", forward_only)


class CpuServerAdapter(ServerAdapter):
    """Sends weights to the vLLM server of this run, and of no other on the same machine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zmq_handle: str = private_address(self.zmq_handle)


# verl has no function to register a rollout adapter by; it imports what stands here by its name.
rollout_base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.{CpuServerAdapter.__name__}"
