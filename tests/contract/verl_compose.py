"""Runs in the policy environment: compose verl's own configuration with each list of overrides and validate it.

Reads {name: [override, ...]} from the file named on the command line; prints {name: {...}} of what verl understood.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

found = {}
with initialize_config_module("verl.trainer.config", version_base=None):
    for name, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
        config = compose("ppo_trainer", overrides=overrides)
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        policy = config.actor_rollout_ref
        found[name] = {
            "reference": need_reference_policy(config),
            "critic": need_critic(config),
            "engine": policy.rollout.name,
            "model": policy.model.path,
            "strategy": [policy.actor.fsdp_config.strategy, policy.ref.fsdp_config.strategy],
            "lr": policy.actor.optim.lr,
            "batch": [config.data.train_batch_size, policy.actor.ppo_mini_batch_size, policy.rollout.n],
            "lengths": [config.data.max_prompt_length, policy.rollout.response_length],
            "device": config.trainer.device,
            "seed": config.data.seed,
        }
json.dump(found, sys.stdout)
