"""Task policy: the initial policy. Has no parents, so that it can be made while the data stages run."""

from tasks.stage import stage_task

__all__ = ["policy"]

policy = stage_task("policy")
