"""GPU check a: the episode loop and GRPO through verl and vLLM on a real model, with held-out questions before and after.

Usage: python tests/gpu/grpo.py --workspace FOLDER [--python PATH] [--toy] [section.key=value ...]. The workspace holds params.yaml and the
stages up to `index`; here policy, train, baseline, export and evaluate run. `--toy` makes the workspace of
the tiny policy by itself and trains on the processor. Prints one JSON line; asserts that every step was made, that no trajectory was
lost, and (not for the toy) that reward and held-out F1 rose.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Workspace
from research_rl.training.run.metrics_log import MetricsLog

BEFORE = ("download", "validate", "prepare", "corpus", "embed", "index")
HERE = ("policy", "train", "baseline", "export", "evaluate")
REAL = [
    "train.hardware=gpu",
    "serving.hardware=gpu",
    "serving.dtype=bfloat16",
    "serving.eager=true",
    "trainer.tensor_parallel=1",
    "trainer.gpu_memory_utilization=0.3",
    "trainer.gradient_checkpointing=false",
    "trainer.max_tokens_per_gpu=2048",
    "train.steps=16",
    "train.prompts_per_step=32",
    "train.rollouts_per_prompt=8",
    "train.mini_batch=16",
    "train.lr=2e-5",
    "trainer.save_every=8",
    "trainer.validate_every=8",
]
HOST = {
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.rollout.free_cache_engine": False,
    "+actor_rollout_ref.rollout.enable_sleep_mode": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "ray_kwargs.ray_init.num_cpus": 64,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 2_000_000_000,
}
"""A bare host has no flash-attn: sdpa attends over a whole packed micro-batch, hence the small ones. The rest keeps the start short."""
TOY = [
    "data.generated.entities=60",
    "data.generated.train_questions=64",
    "data.generated.dev_questions=8",
    "data.generated.test_questions=16",
    "policy.hidden=64",
    "policy.layers=2",
    "policy.warmup_steps=60",
    "train.steps=2",
    "train.prompts_per_step=4",
    "train.rollouts_per_prompt=4",
    "trainer.micro_batch=8",
    "episode.max_response_tokens=128",
    "episode.max_result_tokens=64",
    "evaluation.rows=8",
    "evaluation.bootstrap=100",
]


def main() -> None:
    """Run the stages and print what they show."""
    parser = argparse.ArgumentParser(description="GRPO on a real model, measured before and after.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--python", help="interpreter with verl and vLLM; environments.policy when left out")
    parser.add_argument("--toy", action="store_true", help="tiny policy, two steps, on the processor")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config, workspace = resolve(arguments), Workspace(arguments.workspace.resolve())
    started = time.perf_counter()
    for name in (*(BEFORE if arguments.toy else ()), *HERE):
        print(f"{name} ...", file=sys.stderr, flush=True)
        run_stage(name, config, workspace)
    found = report(config, workspace)
    print(json.dumps({"check": "grpo", "toy": arguments.toy, "seconds": time.perf_counter() - started, **found}))
    require(config, found, arguments.toy)


def resolve(arguments: argparse.Namespace) -> Config:
    """Return the workspace's configuration with the check's overrides."""
    interpreter = [f"environments.policy={arguments.python}"] if arguments.python else []
    if arguments.toy:
        return configuration.load_profile("laptop", [*TOY, *interpreter, *arguments.overrides])
    extra = f"train.extra={json.dumps(HOST)}"
    return configuration.load(arguments.workspace / "params.yaml", [*REAL, extra, *interpreter, *arguments.overrides])


def report(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Return steps, lost trajectories, reward of the first and last steps, and held-out F1 before and after."""
    rows = MetricsLog(workspace.folder("train") / "metrics.jsonl").rows
    rewards = [rows[step]["episode/reward"] for step in sorted(rows)]
    part = max(1, len(rewards) // 5)
    counts = json.loads((workspace.folder("train") / "manifest.json").read_text())["counts"]
    f1 = [json.loads((workspace.folder(name) / "metrics.json").read_text())["f1"]["mean"] for name in ("baseline", "evaluate")]
    return {
        "model": config.policy.path or config.policy.source,
        "steps": len(rewards),
        "lost": counts["lost_trajectories"],
        "reward_first": sum(rewards[:part]) / part,
        "reward_last": sum(rewards[-part:]) / part,
        "f1_before": f1[0],
        "f1_after": f1[1],
        "step_seconds": rows[max(rows)].get("timing_s/step"),
    }


def require(config: Config, found: dict[str, Any], toy: bool) -> None:
    """Assert what the check is for."""
    assert found["steps"] == config.train.steps and found["lost"] == 0, found
    assert toy or (found["reward_last"] > found["reward_first"] and found["f1_after"] > found["f1_before"]), found


if __name__ == "__main__":
    main()
