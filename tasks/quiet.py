"""Deliberate errors without a traceback in Prefect's logs: their message says what to do. Knows logging only."""

from __future__ import annotations

import logging

from research_rl.errors import ResearchError

__all__ = ["WithoutTraceback", "install"]

LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


class WithoutTraceback(logging.Filter):
    """Removes the traceback of a ResearchError from a record; every other record passes as it is."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if record.exc_info and isinstance(record.exc_info[1], ResearchError):
            # exc_text too: it is the traceback as a handler before this one formatted it.
            record.exc_info = record.exc_text = None
        return True


def install() -> None:
    """Put the filter on the loggers of runs, once."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(item, WithoutTraceback) for item in logger.filters):
            logger.addFilter(WithoutTraceback())
