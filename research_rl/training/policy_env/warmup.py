"""Warm a policy up on protocol traces with transformers' Trainer. A process of the policy environment.

ReSearch itself uses no supervised traces; this is for models too small to take the protocol up from a prompt. Invariants: (1) a
trace is laid out token by token as `agent.run_episode` lays out an episode; (2) the loss reads the policy's own tokens only; (3) for
a tiny policy one thread computes and one worker writes traces, so equal parameters give equal weights on equal processors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from research_rl.config import PolicyConfig, PromptConfig
from research_rl.embedding.sentence import fast_bfloat16
from research_rl.training.policy_env import tiny, traces
from research_rl.training.policy_env.traces import Trace

__all__ = ["Collator", "Lesson", "Spec", "encode", "main", "train"]

# The label that transformers leaves out of the loss.
_IGNORED = -100
_REPORT_EVERY = 10
Row = dict[str, list[int]]


class Spec(BaseModel):
    """What the process is told: parameters, the folder the model goes to, and the model to start from (None: a tiny one)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    policy: PolicyConfig
    prompt: PromptConfig
    seed: int
    folder: Path
    base: Path | None = None


def encode(trace: Trace, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Return `input_ids` and `labels` of one trace, each piece encoded by itself; labels are -100 outside the policy's words."""
    ids: list[int] = []
    labels: list[int] = []
    for text, own in trace.pieces:
        piece: list[int] = tokenizer.encode(text.replace(tiny.EOS, str(tokenizer.eos_token)), add_special_tokens=False)
        ids += piece
        labels += piece if own else [_IGNORED] * len(piece)
    return {"input_ids": ids, "labels": labels}


class Lesson(IterableDataset[Row]):
    """The traces of `traces.lesson`, encoded one by one."""

    def __init__(self, spec: Spec, tokenizer: PreTrainedTokenizerFast) -> None:
        self._spec, self._tokenizer = spec, tokenizer

    def __iter__(self) -> Iterator[Row]:
        for trace in traces.lesson(self._spec.policy, self._spec.prompt, self._spec.seed):
            yield encode(trace, self._tokenizer)


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right. No attention mask is needed: attention is causal and padding comes last."""

    pad: int

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels`, each [batch, longest row]."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        return {"input_ids": padded("input_ids", self.pad), "labels": padded("labels", _IGNORED)}


class _LossLines(TrainerCallback):
    """Says each logged loss as a JSON line on standard output."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            print(json.dumps({"step": state.global_step, "of": state.max_steps, "loss": round(float(logs["loss"]), 4)}), flush=True)


def train(spec: Spec) -> dict[str, Any]:
    """Make the policy, warm it up, write its folder; return facts: parameters, vocabulary, steps, tokens, final loss."""
    tokenizer, model = _existing(spec.base) if spec.base else _tiny(spec)
    trainer = Trainer(
        model=model,
        args=_arguments(spec),
        train_dataset=Lesson(spec, tokenizer),
        data_collator=Collator(tiny.token_id(tokenizer, str(tokenizer.pad_token or tokenizer.eos_token))),
        callbacks=[_LossLines()],
    )
    trainer.train()
    # A model from outside goes back to bfloat16, the format that such models are published in; a tiny one keeps float32.
    if spec.base:
        model.bfloat16()
    model.save_pretrained(spec.folder)
    tokenizer.save_pretrained(spec.folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "warmup_steps": trainer.state.global_step,
        "warmup_tokens": int(trainer.state.num_input_tokens_seen),
        "warmup_loss": round(float(losses[-1]), 4) if losses else None,
    }


def _tiny(spec: Spec) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    # The order in which sums are rounded depends on the number of threads.
    torch.set_num_threads(1)
    tokenizer = tiny.build_tokenizer(traces.lexicon(spec.policy, spec.prompt))
    model = tiny.build_model(tokenizer, spec.policy.hidden, spec.policy.layers, spec.seed)
    model.set_attn_implementation("eager")
    return tokenizer, model


def _existing(folder: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return PreTrainedTokenizerFast.from_pretrained(str(folder)), model


def _arguments(spec: Spec) -> TrainingArguments:
    steps = spec.policy.warmup_drills + spec.policy.warmup_steps
    return TrainingArguments(
        output_dir=str(spec.folder),
        per_device_train_batch_size=spec.policy.warmup_batch,
        # In steps, since a data set that is drawn on the way has no length.
        max_steps=steps,
        learning_rate=spec.policy.warmup_lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,
        weight_decay=0.01,
        bf16=fast_bfloat16() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=_REPORT_EVERY,
        include_num_input_tokens_seen=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec.seed,
        dataloader_num_workers=1,
        # The rows hold just what the collator reads; the Trainer would look for columns of a table.
        remove_unused_columns=False,
        # accelerate's default for such a data set: one process draws the batches and hands them out, for which all must be of one width.
        accelerator_config={"dispatch_batches": False},
    )


def main(path: str) -> None:
    """Warm up as the JSON file at `path` says; the last line of standard output holds the facts."""
    spec = Spec.model_validate_json(Path(path).read_bytes())
    print(json.dumps({"facts": train(spec)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
