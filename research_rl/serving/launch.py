"""Render the command that serves a model folder. Knows the flags of vLLM and SGLang; starts nothing.

The access token never stands in the command, which every user of the machine can read: vLLM takes it from the
environment, SGLang from a file of options.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from research_rl.config import ServingConfig
from research_rl.serving.model import ModelFolder

__all__ = ["CPU_CACHE_TOKENS", "HEALTH_PATH", "RESERVED", "Launch", "render", "threads"]

HEALTH_PATH = "/health"
RESERVED = {"vllm": 0, "sglang": 2}
"""Tokens of a sequence that a server keeps for itself, by engine: of 100 SGLang 0.5.23 takes requests of 98."""
CPU_CACHE_TOKENS = 65_536
"""Tokens that SGLang's cache holds on a CPU."""
# With the tiny policy and 32 sequences one thread decodes 3,535 to 4,098 tokens/s, two 2,612 to 3,406 (docs/experiments.md).
SMALL_BYTES = 64 << 20
# The folder is checked and complete: nothing has to be asked of the hub, and no usage is reported.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Launch:
    """A command, what it needs in its environment, and files (path -> text) to be written for its owner alone before."""

    command: list[str]
    env: dict[str, str]
    files: dict[Path, str]


def render(
    config: ServingConfig,
    model: ModelFolder,
    *,
    served_name: str,
    interpreter: str,
    port: int,
    token: str,
    context: int,
    secrets: Path,
    seeded: bool = False,
) -> Launch:
    """Return how to serve `model` with `context` tokens per sequence; `secrets` is a folder for files of options.

    `seeded` says that drawn tokens must follow the seed of each request, which SGLang ignores unless it is told at its start.
    """
    if config.engine == "sglang":
        launched = _sglang(config, model, served_name, interpreter, port, token, context, secrets)
        return replace(launched, command=[*launched.command, "--enable-deterministic-inference"]) if seeded else launched
    return _vllm(config, model, served_name, interpreter, port, token, context)


def threads(chosen: int | None, weight_bytes: int) -> int:
    """Return the CPU threads of one forward pass: those chosen, else one for a small model, whose matrices are not worth splitting."""
    return chosen or (1 if weight_bytes < SMALL_BYTES else len(os.sched_getaffinity(0)))


def _vllm(config: ServingConfig, model: ModelFolder, served_name: str, interpreter: str, port: int, token: str, context: int) -> Launch:
    command = [
        *(interpreter, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.path)),
        *("--served-model-name", served_name),
        *("--host", config.host),
        *("--port", str(port)),
        *("--dtype", config.dtype),
        *("--max-model-len", str(context)),
        *("--max-num-seqs", str(config.max_sequences)),
        *("--tensor-parallel-size", str(config.tensor_parallel)),
        # Its default lets pages of every origin read the answers.
        *("--allowed-origins", "[]"),
        "--disable-uvicorn-access-log",
    ]
    env = {**_OFFLINE, "VLLM_API_KEY": token, "VLLM_LOGGING_COLOR": "0"}
    if config.hardware == "cpu":
        # Eager: there are no CUDA graphs on a CPU, and compiling takes longer than a short evaluation.
        return Launch([*command, "--enforce-eager"], env | _vllm_cpu(config, model), {})
    eager = ["--enforce-eager"] if config.eager else []
    return Launch([*command, *eager, "--gpu-memory-utilization", str(config.gpu_memory_utilization)], env, {})


def _vllm_cpu(config: ServingConfig, model: ModelFolder) -> dict[str, str]:
    """Start fast and keep few cores busy: no inductor compilation, and with one replica no worker process beside the engine."""
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        # Else the sampler is compiled at the first request, which took 26 s after a start of 50 s (docs/experiments.md).
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads(config.threads, model.weight_bytes)),
    }
    # Engine and worker as two processes spin while each waits for the other, on cores that the pipeline needs too.
    return env | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if config.tensor_parallel == 1 else {})


def _sglang(
    config: ServingConfig, model: ModelFolder, served_name: str, interpreter: str, port: int, token: str, context: int, secrets: Path
) -> Launch:
    options = secrets / f"sglang-{port}.yaml"
    command = [
        *(interpreter, "-m", "sglang.launch_server"),
        *("--config", str(options)),
        *("--model-path", str(model.path)),
        *("--served-model-name", served_name),
        *("--host", config.host),
        *("--port", str(port)),
        *("--dtype", config.dtype),
        *("--context-length", str(context + RESERVED["sglang"])),
        *("--max-running-requests", str(config.max_sequences)),
        *("--tp-size", str(config.tensor_parallel)),
        *("--log-level", "warning"),
        # Else every piece of a stream repeats the log-probabilities of all tokens before it.
        "--incremental-streaming-output",
    ]
    files = {options: yaml.safe_dump({"api-key": token})}
    if config.hardware == "cpu":
        return Launch([*command, *_sglang_cpu(context)], _OFFLINE | _sglang_cpu_threads(config, model), files)
    eager = ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"] if config.eager else []
    return Launch([*command, *eager, "--mem-fraction-static", str(config.gpu_memory_utilization)], dict(_OFFLINE), files)


def _sglang_cpu(context: int) -> list[str]:
    """Keep memory and cores for others: else the cache takes 70 % of the machine, and an idle server spins."""
    return ["--device", "cpu", "--max-total-tokens", str(max(CPU_CACHE_TOKENS, context + RESERVED["sglang"])), "--sleep-on-idle"]


def _sglang_cpu_threads(config: ServingConfig, model: ModelFolder) -> dict[str, str]:
    count = threads(config.threads, model.weight_bytes)
    # Its own variable names the cores; of a few free ones SGLang would take none but those it binds.
    cores = sorted(os.sched_getaffinity(0))[-count:]
    return {"OMP_NUM_THREADS": str(count), "SGLANG_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
