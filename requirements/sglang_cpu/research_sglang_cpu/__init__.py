"""A platform for SGLang 0.5.23: an ordinary CPU and PyTorch's own operators. SGLang's own CPU platform needs compiled kernels for AMX.

Installed into `.venv-serve` alone; SGLang finds both functions by the entry points of pyproject.toml, in each of its processes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["activate", "hook"]


def activate() -> str:
    """Return the name of the platform's class."""
    return "research_sglang_cpu.platform:TorchCpu"


def hook() -> None:
    """Leave of `--enable-deterministic-inference` the seeds: its batch-invariant kernels are written for accelerators."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.maybe_enable_batch_invariant_mode", lambda *_: None, HookType.REPLACE)
    HookRegistry.register("sglang.srt.layers.sampler.murmur_hash32", drawn_bits, HookType.REPLACE)


def drawn_bits(seed: Any, positions: Any, columns: Any) -> Any:
    """Return 32-bit integers [row, column] by a row's seed [row] and position [row] and by the columns [column], as tensors of int64.

    In the place of SGLang's function of the same arguments, which is a kernel for GPUs: the same use, other bits.
    """
    import torch

    low = (1 << 32) - 1
    mixed = (seed.to(torch.int64) & (low >> 1))[:, None]
    for part in (positions.to(torch.int64)[:, None], columns.to(torch.int64)[None, :], 0x5BD1, 0x85EB):
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D + part * 0x27D4EB2F + 0x165667B1) & low
        mixed = (mixed ^ (mixed >> 13)) & (low >> 1)
    return mixed * 2
