# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""verl's replay buffer, asked often: its own interval of 2 s is longer than a laptop's rollout and lost a second a step on a GPU."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

__all__ = ["EagerReplayBuffer"]

POLL_S = 0.1


class EagerReplayBuffer(ReplayBuffer):
    """Looks for finished groups every 100 ms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": POLL_S})
