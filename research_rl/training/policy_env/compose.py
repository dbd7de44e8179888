# pyright: reportMissingImports=false
"""Runs in the policy environment: let verl's own schema and validator read lists of overrides.

Input, as JSON on standard input: {name: [override, ...]}. Output, one JSON line: {name: resolved configuration}. A name that
verl does not know, or a combination it refuses, ends this process with its error.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

__all__ = ["main"]

_TYPED = ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.ref.fsdp_config", "actor_rollout_ref.rollout")


def main() -> None:
    """Compose, validate and resolve every case."""
    from hydra import compose, initialize_config_module

    cases: dict[str, list[str]] = json.load(sys.stdin)
    # verl prints while it validates; standard output is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr), initialize_config_module("verl.trainer.config", version_base=None):
        resolved = {name: _checked(compose("ppo_trainer", overrides=overrides)) for name, overrides in cases.items()}
    print(json.dumps(resolved))


def _checked(config: Any) -> Any:
    """Return a composed configuration with every reference resolved, after verl's dataclasses and validator took it."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for name in _TYPED:
        omega_conf_to_dataclass(OmegaConf.select(config, name))
    # verl looks these names up at the first update only.
    get_adv_estimator_fn(config.algorithm.adv_estimator)
    get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    return OmegaConf.to_container(config, resolve=True)


if __name__ == "__main__":
    main()
