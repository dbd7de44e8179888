"""The platform's class. What is not said here keeps SGLang's cautious default."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from sglang.srt.arg_groups import choices
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

__all__ = ["TorchCpu"]

_ATTENTION = "torch_native"


class TorchCpu(SRTPlatform):
    """A machine without an accelerator. The dispatch key `native` chooses PyTorch's form of every fused operator."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose plain attention; `--device cpu` alone chooses one that needs compiled kernels."""
        choices.add_deterministic_attention_backend_choices([_ATTENTION])
        if server_args.attention_backend in {None, "intel_amx"}:
            server_args.attention_backend = _ATTENTION

    def get_default_attention_backend(self) -> str:
        return _ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return psutil.virtual_memory().total

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device(self, device_id: int = 0) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        """Do nothing: there is one device."""

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_capability(self, device_id: int = 0) -> None:
        return None

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
