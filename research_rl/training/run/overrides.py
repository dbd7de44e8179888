"""Render verl 0.9.1's Hydra overrides and process environment from our configuration. Knows verl's option names, runs nothing.

One common block, one named block per hardware (`cpu`, `gpu`), then the user's `train.extra`. GPU and CPU differ by their
block and by nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from research_rl.config import Config
from research_rl.paths import python_path
from research_rl.retriever.source import Taping
from research_rl.serving.launch import threads
from research_rl.serving.tensors import weight_bytes
from research_rl.training.run.variables import ENGINE_THREADS_VARIABLE, TOKEN_VARIABLE

__all__ = ["Paths", "agent_settings", "agent_yaml", "environment", "render", "resolved"]

_ADAPTER = "research_rl.training.policy_env.adapter.SearchAgentLoop"
_MANAGER = "research_rl.training.policy_env.rollout.SearchAgentManager"
_CPU = "research_rl.training.policy_env.cpu"
_MODEL, _ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("model", "actor", "ref", "rollout"))


@dataclass(frozen=True)
class Paths:
    """Where one training run reads and writes; all absolute. `resume` is a `global_step_N` folder or None."""

    model: Path
    train: Path
    dev: Path
    work: Path
    ray: Path
    resume: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of verl's `global_step_N` folders."""
        return self.work / "checkpoints"

    @property
    def episodes(self) -> Path:
        """Folder of one file of episodes per step and agent worker."""
        return self.work / "episodes"

    @property
    def pauses(self) -> Path:
        """Folder of the agent workers' notes about pauses of searching."""
        return self.work / "pauses"

    @property
    def agent(self) -> Path:
        """The agent loop's settings."""
        return self.work / "agent.yaml"


def render(config: Config, paths: Paths) -> list[str]:
    """Return the command-line overrides for `verl.trainer.main_ppo`, in the order Hydra applies them."""
    return [f"{name}={_value(value)}" for name, value in resolved(config, paths).items()]


def resolved(config: Config, paths: Paths) -> dict[str, Any]:
    """Return the overrides as a mapping; a later block replaces an earlier block's value of the same name."""
    hardware = _cpu(config, paths) if config.train.hardware == "cpu" else _gpu(config)
    merged = {**_data(config, paths), **_policy(config, paths), **_rollout(config, paths), **_trainer(config, paths), **hardware}
    for name, value in config.train.extra.items():
        bare = name.lstrip("+")
        # To Hydra these are three overrides of one name, and it refuses two of them together.
        for spelled in (bare, f"+{bare}", f"++{bare}"):
            merged.pop(spelled, None)
        merged[name] = value
    return merged


def agent_yaml(config: Config, paths: Paths, retriever_url: str, taping: Taping | None = None) -> str:
    """Return the agent loop file: which class drives an episode, and with which settings.

    They are one text: verl builds a loop for every episode, and Hydra's copy of a tree would cost more than the episode's turns.
    """
    settings = json.dumps(agent_settings(config, paths, retriever_url, taping))
    return yaml.safe_dump([{"name": "search_agent", "_target_": _ADAPTER, "settings": settings}], sort_keys=False)


def agent_settings(config: Config, paths: Paths, retriever_url: str, taping: Taping | None = None) -> dict[str, Any]:
    """Return what every episode is told of its limits, prompt, reward, retriever and tape. The token stays out of it."""
    return {
        "retriever_url": retriever_url,
        "tape": taping.to_json() if taping else None,
        "episodes": str(paths.episodes),
        "pauses": str(paths.pauses),
        "patience": {
            "window_s": config.retriever.pause_window_s,
            "least": config.retriever.pause_least,
            "share": config.retriever.pause_share,
            "longest_s": config.retriever.pause_max_s,
        },
        "in_flight": config.trainer.episodes_in_flight,
        "reward": config.reward.model_dump(mode="json"),
        "judge": config.judge.model_dump(mode="json"),
        "engine": config.train.engine,
        "prompt": config.prompt.model_dump(mode="json"),
        "limits": config.episode.model_dump(mode="json"),
    }


def environment(config: Config, paths: Paths, token: str) -> dict[str, str]:
    """Return variables for the trainer's process tree; `token` is this attempt's secret, never written to disk."""
    common = {
        **python_path(),
        "PYTHONUNBUFFERED": "1",
        # Ray would hold back lines that repeat; the supervisor reads how many trajectories were padded from the log.
        "RAY_DEDUP_LOGS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # verl starts vLLM's HTTP server on a port of its own choice; without a key anybody on the machine could ask it.
        "VLLM_API_KEY": token,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HYDRA_FULL_ERROR": "1",
        # verl reads its parquet files through datasets, whose copies then go with the work folder.
        "HF_DATASETS_CACHE": str(paths.work / "datasets"),
    }
    private = _private_ray(token) if config.cluster.launcher == "local" else {}
    return {**common, **private, **(_cpu_environment(config, paths, token) if config.train.hardware == "cpu" else {})}


def _private_ray(token: str) -> dict[str, str]:
    """Variables of a Ray that the trainer starts for itself; a cluster that stands has its own."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray starts its workers at niceness 15, behind everything else on the machine.
        "RAY_worker_niceness": "0",
    }


def _data(config: Config, paths: Paths) -> dict[str, Any]:
    return {
        "data.train_files": [str(paths.train)],
        "data.val_files": [str(paths.dev)],
        "data.prompt_key": "prompt",
        "data.train_batch_size": config.train.prompts_per_step,
        "data.max_prompt_length": config.prompt.max_tokens,
        "data.max_response_length": config.episode.max_response_tokens,
        # The agent renders its own prompt from our template; verl would measure the chat template's instead.
        "data.filter_overlong_prompts": False,
        "data.seed": config.train_seed,
    }


def _policy(config: Config, paths: Paths) -> dict[str, Any]:
    train, trainer = config.train, config.trainer
    return {
        **_objective(config),
        **_filter(config),
        **_correction(config),
        f"{_MODEL}.path": str(paths.model),
        f"{_MODEL}.enable_gradient_checkpointing": trainer.gradient_checkpointing,
        f"{_ACTOR}.strategy": "fsdp2",
        f"{_ACTOR}.fsdp_config.strategy": "fsdp2",
        f"{_ACTOR}.optim.lr": train.lr,
        f"{_ACTOR}.optim.weight_decay": train.weight_decay,
        f"{_ACTOR}.optim.lr_warmup_steps": train.lr_warmup_steps,
        f"{_ACTOR}.ppo_mini_batch_size": train.mini_batch or train.prompts_per_step,
        f"{_ACTOR}.entropy_coeff": train.entropy_coef,
        # For the watch: without an entropy term in the loss verl would leave it out.
        f"{_ACTOR}.calculate_entropy": True,
        f"{_ACTOR}.use_kl_loss": train.kl_coef > 0,
        f"{_ACTOR}.kl_loss_coef": train.kl_coef,
        f"{_ACTOR}.kl_loss_type": "low_var_kl",
        # `hf_model` is for the export alone: training goes on from the shards.
        f"{_ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{_ACTOR}.checkpoint.load_contents": ["model", "optimizer", "extra"],
        f"{_REF}.strategy": "fsdp2",
        f"{_REF}.fsdp_config.strategy": "fsdp2",
        **_adapter(config),
    }


def _objective(config: Config) -> dict[str, Any]:
    """The advantage and the loss; verl knows Dr. GRPO's advantage as GRPO's without the division by the standard deviation."""
    train = config.train
    return {
        "algorithm.adv_estimator": "grpo" if train.advantage == "dr_grpo" else train.advantage,
        # The KL term stands in the loss, as in GRPO.
        "algorithm.use_kl_in_reward": False,
        "algorithm.norm_adv_by_std_in_grpo": train.advantage != "dr_grpo",
        f"{_ACTOR}.policy_loss.loss_mode": train.loss,
        f"{_ACTOR}.loss_agg_mode": train.loss_mean,
        # Unset, verl divides by the width of the padded batch, which differs from one to the next.
        f"{_ACTOR}.loss_scale_factor": config.episode.max_response_tokens if train.loss_mean == "seq-mean-token-sum-norm" else None,
        f"{_ACTOR}.clip_ratio": train.clip_ratio,
        f"{_ACTOR}.clip_ratio_low": train.clip_ratio_low or train.clip_ratio,
        f"{_ACTOR}.clip_ratio_high": train.clip_ratio_high or train.clip_ratio,
    }


def _filter(config: Config) -> dict[str, Any]:
    """Dynamic sampling: `algorithm` makes verl fetch single questions, the sampler's words tell our replay buffer, which filters."""
    groups, sampler = config.train.filter_groups, "+trainer.v1.sampler.sampler_kwargs"
    if not groups.enabled:
        return {}
    return {
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": groups.metric,
        "algorithm.filter_groups.max_inflight_gen_batches": groups.batches_in_flight,
        f"{sampler}.filter_groups_metric": groups.metric,
        f"{sampler}.max_inflight_gen_batches": groups.batches_in_flight,
        f"{sampler}.train_batch_size": config.train.prompts_per_step,
        f"{sampler}.max_batches": groups.max_batches,
    }


def _correction(config: Config) -> dict[str, Any]:
    """Importance weights of the rollout; verl computes them only where it recomputes the old policy's log-probabilities."""
    correction, name = config.train.rollout_correction, "algorithm.rollout_correction"
    if correction.method == "none":
        return {}
    return {
        f"{name}.bypass_mode": False,
        f"{name}.rollout_is": correction.level,
        f"{name}.rollout_is_threshold": correction.threshold,
        f"{name}.rollout_is_batch_normalize": correction.normalise,
    }


def _adapter(config: Config) -> dict[str, Any]:
    """A low-rank adapter; verl merges it into the weights it hands to the engine, which then needs no adapter support."""
    train = config.train
    if not train.lora_rank:
        return {}
    return {
        f"{_MODEL}.lora_rank": train.lora_rank,
        f"{_MODEL}.lora_alpha": train.lora_alpha,
        f"{_MODEL}.target_modules": "all-linear" if train.lora_targets == ("all-linear",) else list(train.lora_targets),
        f"{_MODEL}.lora.merge": True,
    }


def _rollout(config: Config, paths: Paths) -> dict[str, Any]:
    train, trainer = config.train, config.trainer
    return {
        f"{_ROLLOUT}.name": train.engine,
        f"{_ROLLOUT}.mode": "async",
        f"{_ROLLOUT}.n": train.rollouts_per_prompt,
        f"{_ROLLOUT}.temperature": train.temperature,
        f"{_ROLLOUT}.tensor_model_parallel_size": trainer.tensor_parallel,
        f"{_ROLLOUT}.max_model_len": config.prompt.max_tokens + config.episode.max_response_tokens,
        f"{_ROLLOUT}.calculate_log_probs": True,
        f"{_ROLLOUT}.seed": config.train_seed,
        f"{_ROLLOUT}.agent.default_agent_loop": "search_agent",
        f"{_ROLLOUT}.agent.agent_loop_config_path": str(paths.agent),
        f"+{_ROLLOUT}.agent.agent_loop_manager_class": _MANAGER,
        # The agent loop grades its own trajectory, which knows who wrote what; verl's reward workers would stay idle.
        "reward.num_workers": 0,
        **(_whole_turns(config) if train.engine == "vllm" else {}),
    }


def _whole_turns(config: Config) -> dict[str, Any]:
    """Let vLLM report a turn's first token and its end: verl reads nothing in between, and each report copies the whole turn."""
    return {f"+{_ROLLOUT}.engine_kwargs.vllm.stream_interval": config.prompt.max_tokens + config.episode.max_response_tokens}


def _trainer(config: Config, paths: Paths) -> dict[str, Any]:
    train, trainer = config.train, config.trainer
    return {
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",
        "trainer.v1.sampler.custom_sampler.path": "pkg://research_rl.training.policy_env.sampler",
        "trainer.v1.sampler.custom_sampler.name": "EagerReplayBuffer",
        # The supervisor reads the file, whose name it gives by VERL_FILE_LOGGER_PATH.
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "research-rl",
        "trainer.experiment_name": config.profile,
        "trainer.nnodes": trainer.nodes,
        "trainer.n_gpus_per_node": trainer.gpus_per_node,
        "trainer.default_local_dir": str(paths.checkpoints),
        "trainer.save_freq": trainer.save_every,
        # The supervisor alone removes checkpoints: two that remove the same folder at once trip over each other.
        "trainer.max_actor_ckpt_to_keep": None,
        "trainer.resume_mode": "resume_path" if paths.resume else "disable",
        "trainer.resume_from_path": str(paths.resume) if paths.resume else None,
        # -1 is verl's word for never.
        "trainer.test_freq": trainer.validate_every or -1,
        "trainer.val_before_train": trainer.validate_every is not None,
        # Never the limit: an epoch has a step at least, and the number of steps ends the training.
        "trainer.total_epochs": train.steps + 1,
        "trainer.total_training_steps": train.steps,
        "hydra.run.dir": str(paths.work / "hydra"),
    }


def _gpu(config: Config) -> dict[str, Any]:
    """FSDP2 on accelerators: packed sequences by flash attention, dynamic batches, optional offload."""
    train, trainer = config.train, config.trainer
    tokens = trainer.max_tokens_per_gpu or 2 * (config.prompt.max_tokens + config.episode.max_response_tokens)
    return {
        f"{_MODEL}.use_remove_padding": True,
        f"+{_MODEL}.override_config.attn_implementation": "flash_attention_2",
        f"{_ACTOR}.use_dynamic_bsz": True,
        f"{_ACTOR}.ppo_max_token_len_per_gpu": tokens,
        f"{_ROLLOUT}.log_prob_use_dynamic_bsz": True,
        # Without gradients no activations are kept, so that twice the tokens fit.
        f"{_ROLLOUT}.log_prob_max_token_len_per_gpu": 2 * tokens,
        f"{_REF}.log_prob_use_dynamic_bsz": True,
        f"{_REF}.log_prob_max_token_len_per_gpu": 2 * tokens,
        f"{_ACTOR}.fsdp_config.param_offload": trainer.offload == "idle",
        f"{_ACTOR}.fsdp_config.optimizer_offload": trainer.offload == "idle",
        f"{_ACTOR}.fsdp_config.offload_policy": trainer.offload == "always",
        # Used for one pass a step; the rest of the time its memory is the engine's.
        f"{_REF}.fsdp_config.param_offload": True,
        f"{_ROLLOUT}.gpu_memory_utilization": trainer.gpu_memory_utilization,
        f"{_ROLLOUT}.max_num_seqs": 1024,
        f"{_ROLLOUT}.max_num_batched_tokens": max(8192, config.prompt.max_tokens + config.episode.max_response_tokens),
        f"{_ROLLOUT}.agent.num_workers": max(1, min(8 * trainer.nodes, train.prompts_per_step)),
        "trainer.device": "cuda",
    }


def _cpu(config: Config, paths: Paths) -> dict[str, Any]:
    """One CPU worker and one vLLM CPU engine, as few processes as verl allows."""
    train, trainer = config.train, config.trainer
    length = config.prompt.max_tokens + config.episode.max_response_tokens
    precision = {"param_dtype": _SHORT[train.cpu_dtype], "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return {
        f"{_MODEL}.external_lib": f"{_CPU}.engine",
        f"{_MODEL}.use_remove_padding": False,
        f"+{_MODEL}.override_config.attn_implementation": "sdpa",
        # Without flash attention verl's plain path takes one logsumexp per token; its fused one works on whole chunks.
        f"{_MODEL}.use_fused_kernels": True,
        f"{_MODEL}.fused_kernel_options.impl_backend": "torch",
        f"{_ACTOR}.use_torch_compile": False,
        f"{_ACTOR}.fsdp_config.use_torch_compile": False,
        f"{_ACTOR}.fsdp_config.dtype": train.cpu_dtype,
        f"+{_ACTOR}.fsdp_config.mixed_precision": precision,
        f"{_REF}.fsdp_config.dtype": train.cpu_dtype,
        f"+{_REF}.fsdp_config.mixed_precision": precision,
        f"{_ACTOR}.use_dynamic_bsz": True,
        f"{_ACTOR}.ppo_max_token_len_per_gpu": trainer.micro_batch * length,
        # The engine's log-probabilities of one step's trajectories are the old policy's: equal to 1e-6 in float32.
        "algorithm.rollout_correction.bypass_mode": train.cpu_dtype == "float32" and not _corrects(config),
        f"{_ROLLOUT}.dtype": train.cpu_dtype,
        f"{_ROLLOUT}.enforce_eager": True,
        f"{_ROLLOUT}.free_cache_engine": False,
        # Sleeping gives the memory of an accelerator back.
        f"+{_ROLLOUT}.enable_sleep_mode": False,
        f"{_ROLLOUT}.max_num_seqs": min(256, train.prompts_per_step * train.rollouts_per_prompt),
        f"{_ROLLOUT}.max_num_batched_tokens": max(4096, length),
        f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": 256,
        f"+{_ROLLOUT}.engine_kwargs.vllm.worker_extension_cls": f"{_CPU}.vllm_worker.CpuWorkerExtension",
        **({f"+{_ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": "uni"} if trainer.tensor_parallel == 1 else {}),
        f"{_ROLLOUT}.agent.num_workers": 1,
        "data.dataloader_num_workers": 0,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.device": "cpu",
        **(_small_ray(paths) if config.cluster.launcher == "local" else {}),
    }


def _corrects(config: Config) -> bool:
    """Whether something compares the engine's log-probabilities with the trainer's, which needs both."""
    extra = any(name.startswith("algorithm.rollout_correction.") for name in config.train.extra_names)
    return extra or config.train.rollout_correction.method != "none"


def _small_ray(paths: Paths) -> dict[str, Any]:
    """The private Ray of a CPU run; Ray refuses these words about a cluster that stands."""
    return {
        # verl's bundles ask for 3 CPUs and each of its actors for 1, whatever the machine has.
        "ray_kwargs.ray_init.num_cpus": 12,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 512 * 2**20,
        "+ray_kwargs.ray_init._temp_dir": str(paths.ray),
    }


_SHORT: dict[Literal["float32", "bfloat16"], str] = {"float32": "fp32", "bfloat16": "bf16"}


def _cpu_environment(config: Config, paths: Paths, token: str) -> dict[str, str]:
    cores = str(os.cpu_count() or 1)
    modules = [f"{_CPU}.platform", *([f"{_CPU}.ray_start"] if config.cluster.launcher == "local" else [])]
    return {
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        # How long the node waits for its agents and workers to answer; see `ray_start`.
        "RAY_agent_register_timeout_ms": "600000",
        "RAY_worker_register_timeout_seconds": "600",
        TOKEN_VARIABLE: token[:12],
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(config.trainer.kv_cache_gib),
        "OMP_NUM_THREADS": cores,
        ENGINE_THREADS_VARIABLE: str(threads(config.trainer.threads, weight_bytes(paths.model))),
        # Unset, vLLM would put its only worker into a process of its own, and both would spin while they wait for each other.
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if config.trainer.tensor_parallel == 1 else {}),
        # The sampler and the loss would be compiled at the first step, for longer than a small policy's steps gain by it.
        "TORCH_COMPILE_DISABLE": "1",
        # Trainer, engine and agents take turns on the same cores; spinning threads would take them from each other.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TQ_NUM_THREADS": cores,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray would start idle workers in advance, one for each CPU that it was told of.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "HF_HUB_OFFLINE": "1",
    }


def _value(value: Any) -> str:
    """Write a value in Hydra's override grammar; text is always quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_value(item) for item in value) + "]"
    # In Hydra's quotes a backslash is an escape only before a quote and at the end.
    quoted = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value))
    return f"'{quoted}'"
