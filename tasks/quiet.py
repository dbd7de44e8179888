"""What Prefect logs that helps nobody: tracebacks of deliberate errors, links to a server that ends with the run. Knows logging only."""

from __future__ import annotations

import logging

from research_rl.errors import ResearchError

__all__ = ["WithoutLink", "WithoutTraceback", "install"]

LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


class WithoutTraceback(logging.Filter):
    """Removes the traceback of a ResearchError from a record; every other record passes as it is."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if record.exc_info and isinstance(record.exc_info[1], ResearchError):
            # exc_text too: it is the traceback as a handler before this one formatted it.
            record.exc_info = record.exc_text = None
        return True


class WithoutLink(logging.Filter):
    """Drops the link to a run's page, for a server that is gone before anyone can follow it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass but Prefect's "View at <address>"."""
        return not record.getMessage().startswith("View at ")


def install(kind: type[logging.Filter]) -> None:
    """Put a filter on the loggers of runs, once."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(item, kind) for item in logger.filters):
            logger.addFilter(kind())
