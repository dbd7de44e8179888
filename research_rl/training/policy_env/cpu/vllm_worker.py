# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""verl's vLLM worker extension for the CPU backend: keeps plain weights, so that they can be loaded again each step.

vLLM's CPU backend packs every linear weight for oneDNN and drops the original, after which `load_weights` has nothing
to copy into. With packing off the rest of verl's extension works unchanged.
Importing this module also sets the engine's threads: it alone is imported in the process that computes, before the model is made.
"""

from __future__ import annotations

import os

import torch
import vllm._custom_ops as ops
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from research_rl.training.policy_env.cpu.transfer import private_address
from research_rl.training.run.variables import ENGINE_THREADS_VARIABLE

__all__ = ["CpuWorkerExtension"]

# Read when vLLM prepares the layers of a model that it has loaded, so it is set before.
ops._supports_onednn = False
torch.set_num_threads(int(os.environ[ENGINE_THREADS_VARIABLE]))


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """Receives weights from the trainer of this run, and of no other on the same machine."""

    def _get_zmq_handle(self) -> str:
        return private_address(str(super()._get_zmq_handle()))
