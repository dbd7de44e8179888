"""What arXiv 2503.19470 and its published scripts say about every hyperparameter, and why ours differs where it does.

Knows values and reasons; `docs/paper_index.md` shows this table and a test holds the two together. A parameter is read from
verl's resolved configuration (`verl`) or from ours (`ours`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research_rl.config import Config
from research_rl.report import markdown

__all__ = ["PARAMETERS", "PaperParameter", "Parameter", "compare", "table"]


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter; `paper` or `script` is None where it says nothing. `why` allows ours to differ."""

    name: str
    verl: str = ""
    ours: str = ""
    paper: Any = None
    script: Any = None
    why: str = ""

    @property
    def place(self) -> str:
        """Where the value is read: a verl option or one of our parameters."""
        return f"verl `{self.verl}`" if self.verl else f"`{self.ours}`"

    @property
    def stated(self) -> Any:
        """What ours is held against: the paper's value, else the script's."""
        # Where the two disagree the paper counts; `why` says so at the parameter.
        return self.script if self.paper is None else self.paper


@dataclass(frozen=True)
class PaperParameter:
    """A parameter and the value a resolved configuration gives it."""

    parameter: Parameter
    value: Any

    @property
    def equal(self) -> bool:
        """Whether the value is the stated one."""
        # Neither says anything: ours is shown beside nothing and cannot differ.
        return self.parameter.stated is None or self.value == self.parameter.stated

    @property
    def unexplained(self) -> bool:
        """Whether the value differs from the stated one without a reason."""
        return not self.equal and not self.parameter.why


_ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
# The batch is the mini-batch in both: old and new policy are the same when the only update is made.
_ONE_UPDATE = "with one update a batch the probability ratio is 1 and no clip acts"

_DATA = (
    Parameter("training questions", ours="data.train", paper=["musique/train.jsonl"], script=["musique/train.jsonl"]),
    Parameter("validation questions", ours="prepare.dev_rows", script=100),
    Parameter("corpus (Wikipedia of December 2018)", ours="data.corpus", paper="retrieval-corpus/wiki18_100w.zip"),
    Parameter("retrieval model", ours="encoder.model", paper="intfloat/e5-base-v2", script="intfloat/e5-base-v2"),
    Parameter(
        "longest query, tokens",
        ours="encoder.max_tokens",
        script=128,
        why="one limit for queries and passages; it keeps whatever 128 keeps",
    ),
    Parameter("passages a search", ours="episode.top_k", paper=5, script=5),
    Parameter("longest prompt, tokens", verl="data.max_prompt_length", script=512),
    Parameter("longest response, tokens", verl="data.max_response_length", script=8192),
    Parameter(
        "drop longer prompts",
        verl="data.filter_overlong_prompts",
        script=True,
        why="our stage leaves them out before verl starts, measured with the template that is used",
    ),
    Parameter("truncation", verl="data.truncation", script="error"),
    Parameter("shuffle", verl="data.shuffle", script=True),
    Parameter("seed of the order", verl="data.seed", script=1, why="any seed will do; `train.seed` asks whether a gain is its noise"),
    Parameter(
        "searches an episode",
        ours="episode.max_searches",
        script="no limit",
        why="a bound on time; 8,192 tokens hold about a dozen searches",
    ),
    Parameter(
        "tokens a search result",
        ours="episode.max_result_tokens",
        script="no limit",
        why="a bound on one result; five passages of 100 words take about 700",
    ),
    Parameter("seconds an episode", ours="episode.wall_s", script="no limit", why="a stuck engine or retriever must not stop a step"),
)
_METHOD = (
    Parameter("advantage", verl="algorithm.adv_estimator", paper="grpo", script="grpo"),
    Parameter("advantage divided by the group's deviation", verl="algorithm.norm_adv_by_std_in_grpo", paper=True, script=True),
    Parameter(
        "reward",
        ours="reward.rule",
        paper="paper",
        script="repository",
        why="the rule of the published code, which is stricter on format; `reward.rule=paper` is equation 2",
    ),
    Parameter("questions a step", verl="data.train_batch_size", paper=256, script=256),
    Parameter("questions an update", verl=f"{_ACTOR}.ppo_mini_batch_size", script=256),
    Parameter("updates a batch", verl=f"{_ACTOR}.ppo_epochs", script=1),
    Parameter("rollouts a question", verl=f"{_ROLLOUT}.n", paper=5, script=5),
    Parameter(
        "steps (2 epochs of 19,938 questions)",
        verl="trainer.total_training_steps",
        paper=154,
        script=153,
        why="2 x floor(19,938 / 256) = 154; the fork's counter leaves its loop one step early",
    ),
    Parameter(
        "epochs", verl="trainer.total_epochs", paper=2, script=2, why="the number of steps decides; epochs only must not end it earlier"
    ),
    Parameter("learning rate", verl=f"{_ACTOR}.optim.lr", paper=1e-6, script=1e-6),
    Parameter("schedule", verl=f"{_ACTOR}.optim.lr_scheduler_type", script="constant"),
    Parameter("warm-up steps", verl=f"{_ACTOR}.optim.lr_warmup_steps", script=0),
    Parameter("optimizer", verl=f"{_ACTOR}.optim.optimizer", script="AdamW"),
    Parameter("Adam's betas", verl=f"{_ACTOR}.optim.betas", script=[0.9, 0.999]),
    Parameter("weight decay", verl=f"{_ACTOR}.optim.weight_decay", script=0.01),
    Parameter("gradient clipping", verl=f"{_ACTOR}.grad_clip", script=1.0),
    Parameter("clip range", verl=f"{_ACTOR}.clip_ratio", paper=0.2, script=0.2),
    Parameter("clip range, lower", verl=f"{_ACTOR}.clip_ratio_low", paper=0.2, script=0.2),
    Parameter("clip range, upper", verl=f"{_ACTOR}.clip_ratio_high", paper=0.2, script=0.2),
    Parameter(
        "second clip of negative advantages",
        verl=f"{_ACTOR}.clip_ratio_c",
        script="none",
        why=f"verl 0.9.1 always has it; {_ONE_UPDATE}",
    ),
    Parameter("mean of the loss", verl=f"{_ACTOR}.loss_agg_mode", script="token-mean"),
    Parameter("KL in the loss", verl=f"{_ACTOR}.use_kl_loss", paper=True, script=True),
    Parameter("KL coefficient", verl=f"{_ACTOR}.kl_loss_coef", paper=0.001, script=0.001),
    Parameter("KL estimate", verl=f"{_ACTOR}.kl_loss_type", script="low_var_kl"),
    Parameter("KL in the reward", verl="algorithm.use_kl_in_reward", script=False),
    Parameter("entropy bonus", verl=f"{_ACTOR}.entropy_coeff", script=0.001),
    Parameter("temperature of rollouts", verl=f"{_ROLLOUT}.temperature", paper=1.0, script=1.0),
    Parameter("top-p of rollouts", verl=f"{_ROLLOUT}.top_p", script=1),
    Parameter("top-k of rollouts", verl=f"{_ROLLOUT}.top_k", script=-1),
    Parameter("critic warm-up", verl="trainer.critic_warmup", script=0),
    Parameter("rank of an adapter (0: all weights are trained)", verl="actor_rollout_ref.model.lora_rank", paper=0, script=0),
)
_SYSTEM = (
    Parameter("machines", verl="trainer.nnodes", paper=8, script=8, why="the `-node` profiles use one machine"),
    Parameter("GPUs a machine", verl="trainer.n_gpus_per_node", paper=8, script=8),
    Parameter("sharding", verl=f"{_ACTOR}.strategy", script="fsdp", why="FSDP2 replaces FSDP; the same full sharding"),
    Parameter("number format of the trained weights", verl=f"{_ACTOR}.fsdp_config.model_dtype", script="fp32"),
    Parameter("recompute activations", verl="actor_rollout_ref.model.enable_gradient_checkpointing", paper=True, script=True),
    Parameter("packed sequences", verl="actor_rollout_ref.model.use_remove_padding", script=True),
    Parameter("batches by tokens", verl=f"{_ACTOR}.use_dynamic_bsz", script=True),
    Parameter("tokens a pass, update", verl=f"{_ACTOR}.ppo_max_token_len_per_gpu", script=17_408),
    Parameter("tokens a pass, old policy", verl=f"{_ROLLOUT}.log_prob_max_token_len_per_gpu", script=34_816),
    Parameter("tokens a pass, reference", verl=f"{_REF}.log_prob_max_token_len_per_gpu", script=34_816),
    Parameter("weights wait in host memory", verl=f"{_ACTOR}.fsdp_config.param_offload", script=False),
    Parameter("optimizer waits in host memory", verl=f"{_ACTOR}.fsdp_config.optimizer_offload", script=False),
    Parameter(
        "training state lives in host memory",
        verl=f"{_ACTOR}.fsdp_config.offload_policy",
        script=False,
        why="only in `paper-32b-node` and `paper-32b-base-node`, where 8 x 80 GB do not hold it",
    ),
    Parameter("reference weights in host memory", verl=f"{_REF}.fsdp_config.param_offload", script=True),
    Parameter(
        "GPUs an engine",
        verl=f"{_ROLLOUT}.tensor_model_parallel_size",
        script=2,
        why="4 for 32B: two halves of its weights (66 GB) leave little cache in 60 % of 80 GB",
    ),
    Parameter("memory share of the engine", verl=f"{_ROLLOUT}.gpu_memory_utilization", script=0.6),
    Parameter("sequences in an engine", verl=f"{_ROLLOUT}.max_num_seqs", script=1024),
    Parameter(
        "engine without CUDA graphs", verl=f"{_ROLLOUT}.enforce_eager", script=True, why="graphs make decoding faster and change no result"
    ),
    Parameter("engine frees its cache for the update", verl=f"{_ROLLOUT}.free_cache_engine", script=True),
    Parameter("validate before training", verl="trainer.val_before_train", script=True),
    Parameter("steps between validations", verl="trainer.test_freq", script=10),
    Parameter("steps between checkpoints", verl="trainer.save_freq", script=10),
    Parameter(
        "resume",
        verl="trainer.resume_mode",
        script="auto",
        why="our own scan finds the newest whole checkpoint; verl's would take a half-written one",
    ),
    Parameter("trackers", verl="trainer.logger", script=["console", "wandb"], why="metrics go to a file, from there to MLflow"),
)
_EVALUATION = (
    Parameter(
        "held-out questions",
        ours="data.test",
        paper=["hotpotqa/dev.jsonl", "2wikimultihopqa/dev.jsonl", "musique/dev.jsonl", "bamboogle/test.jsonl"],
    ),
    Parameter("temperature of evaluation", ours="evaluation.temperature", paper=0.0, script=0.0),
    Parameter("seed of evaluation", ours="evaluation.seed", script=2024, why="greedy decoding uses none; it seeds the bootstrap"),
    Parameter("its token limit bounds the prompt too and empties what it cuts", ours="evaluation.published_limits", script=True),
    Parameter("episodes at once", ours="evaluation.concurrency", script=100, why="coroutines, not threads; no effect on results"),
    Parameter("server", ours="serving.engine", script="sglang"),
    Parameter("GPUs a server", ours="serving.tensor_parallel", script=2, why="4 for 32B"),
    Parameter("number format of the server", ours="serving.dtype", script="bfloat16"),
)
PARAMETERS = (*_DATA, *_METHOD, *_SYSTEM, *_EVALUATION)


def compare(config: Config, hydra: Mapping[str, Any]) -> list[PaperParameter]:
    """Hold a configuration and the verl configuration it resolves to against paper and scripts, parameter by parameter."""
    tree = config.model_dump(mode="json")
    return [
        PaperParameter(parameter, _value(hydra if parameter.verl else tree, parameter.verl or parameter.ours)) for parameter in PARAMETERS
    ]


def table(compared: Sequence[PaperParameter]) -> str:
    """Return the comparison as a markdown table, one row a parameter."""
    return markdown.table(("parameter", "read from", "paper", "published script", "ours", "why it differs"), map(_cells, compared))


def _cells(comparison: PaperParameter) -> tuple[str, ...]:
    parameter = comparison.parameter
    why = parameter.why or ("" if comparison.equal else "no reason given")
    return parameter.name, parameter.place, _shown(parameter.paper), _shown(parameter.script), _shown(comparison.value), why


def _value(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value[part]
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    # Before int, of which bool is a kind.
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
