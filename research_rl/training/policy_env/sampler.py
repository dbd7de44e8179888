# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""verl's replay buffer, asked often, with dynamic sampling that has an end. Runs in verl's trainer; knows no episode.

verl tells a buffer that is not its own nothing of `algorithm.filter_groups`, so `sampler_kwargs` does. Invariant: for one step
at most `max_batches` times the batch is played; when too few of those groups differ in reward, training ends with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

__all__ = ["EagerReplayBuffer"]

POLL_S = 0.1
"""verl's own interval of 2 s is longer than a laptop's rollout and lost a second a step on a GPU."""


class EagerReplayBuffer(ReplayBuffer):
    """Looks for finished groups every 100 ms; `sampler_kwargs` holds verl's names for the filter, and `max_batches`."""

    def __init__(self, *args: Any, sampler_kwargs: Mapping[str, Any], refill_fn: Callable[[int], Any] | None = None, **kwargs: Any) -> None:
        options = dict(sampler_kwargs)
        self._batches = int(options.pop("max_batches", 0))
        self._left, self._submit = 0, refill_fn
        # Refills are single questions, which verl's trainer tells its own buffer alone.
        if options:
            options["gen_batch_size"] = 1
        super().__init__(*args, sampler_kwargs=sampler_kwargs, refill_fn=self._refill, poll_interval=POLL_S, **options, **kwargs)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        """Return a step's batch as verl does. Raises RuntimeError when the questions of `max_batches` do not give one."""
        self._left = (self._batches - 1) * batch_size
        return super().sample(global_steps, partition_id, batch_size)

    def _refill(self, count: int) -> None:
        """Play `count` further questions, as far as the limit leaves room."""
        count = min(count, self._left)
        if count and self._submit:
            self._left -= count
            self._submit(count)

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        # Both of verl's waiting loops come through here whenever a batch is not yet there.
        playing = self.pending_keys[partition_id] or self.running_keys[partition_id]
        if self.filter_groups_metric is not None and partition_id != "val" and not self._left and not playing:
            differing = len(self.finished_keys[partition_id] | self.failure_keys[partition_id])
            raise RuntimeError(
                f"only {differing} of the groups of train.filter_groups.max_batches={self._batches} batches differ in "
                f"{self.filter_groups_metric}, {self.train_batch_size} are needed for a step; "
                "raise it, ease the questions, raise train.temperature, or set train.filter_groups.enabled=false"
            )
        return super()._wait_for_next_poll(partition_id, last_debug_time)
