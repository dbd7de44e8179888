"""Task download: bring the raw snapshot into data/."""

from tasks.stage import stage_task

__all__ = ["download"]

download = stage_task("download")
