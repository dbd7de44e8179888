"""Runs in the policy environment: the replay buffer as verl's trainer builds it from overrides, fed by questions whose rewards are known.

Input, as JSON on standard input: {name: {"overrides": [...], "rewards": [[a group's rewards], ...], "batch": n}}; questions are played
in the order of `rewards`. Prints {name: {"trained": [groups], "metrics": {...}, "played": n} or {"error": text}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from ray_limits import TOO_SLOW, TRIES  # by its own name: a library installs a package `tests` there
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict


class Questions:
    """Plays questions at once, in the place of the agent workers, and puts what they would put."""

    def __init__(self, name: str, rewards: list[list[float]]) -> None:
        self.name, self.rewards, self.played = name, rewards, 0

    def play(self, count: int) -> None:
        for number in range(self.played, self.played + count):
            uid = f"{self.name}{number}"
            keys = [f"{uid}_{index}_0" for index in range(len(self.rewards[number]))]
            fields = [{"rm_scores": torch.tensor([0.0, score])} for score in self.rewards[number]]
            tq.kv_batch_put(
                keys=keys, fields=list_of_dict_to_tensordict(fields), tags=[{"status": "success"}] * len(keys), partition_id="train"
            )
            tq.kv_batch_put(keys=[uid], tags=[{"is_prompt": True, "status": "finished", "global_steps": 1}], partition_id="train")
        self.played += count


def sampled(config: Any, name: str, rewards: list[list[float]], batch: int) -> dict[str, Any]:
    questions = Questions(name, rewards)
    trainer = object.__new__(PPOTrainerSync)
    trainer.config, trainer.trainer_mode, trainer._add_prompts_to_generate = config, "sync", questions.play
    buffer = trainer._build_replay_buffer()
    questions.play(batch)
    try:
        found, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=batch)
    except RuntimeError as error:
        return {"error": str(error), "played": questions.played}
    numbers = sorted({int(key.split("_")[0].removeprefix(name)) for key in found.keys})
    return {"trained": numbers, "metrics": {key: value for key, value in metrics.items() if key[0] != "_"}, "played": questions.played}


def started() -> bool:
    """Start Ray, which gives up after 30 seconds; a busy machine may need longer."""
    try:
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    except Exception as error:  # Ray raises no narrower one
        if TOO_SLOW not in str(error):
            raise
        ray.shutdown()
    return ray.is_initialized()


def main() -> None:
    cases = json.load(sys.stdin)
    with initialize_config_module("verl.trainer.config", version_base=None):
        configs = {name: compose("ppo_trainer", overrides=case["overrides"]) for name, case in cases.items()}
    if not any(started() for _ in range(TRIES)):
        sys.exit(f"Ray {TOO_SLOW}")
    tq.init(next(iter(configs.values())).transfer_queue)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        found[name] = sampled(configs[name], name, case["rewards"], case["batch"])
        # Nothing is left where the filter took every question away.
        if left := list((tq.kv_list() or {}).get("train", {})):
            tq.kv_clear(partition_id="train", keys=left)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
