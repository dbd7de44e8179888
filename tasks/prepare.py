"""Task prepare: questions as the trainer's parquet."""

from tasks.stage import stage_task

__all__ = ["prepare"]

prepare = stage_task("prepare")
