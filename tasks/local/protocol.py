"""How Prefect's and MLflow's servers take connections: with a deadline for the headers, and as many as the open files allow.

For uvicorn's `--http` alone: importing this raises the process's limit of open files.
"""

from __future__ import annotations

import logging

from research_rl.process.connections import bounded
from research_rl.process.open_files import file_limit

__all__ = ["Bounded"]

_LOG = logging.getLogger("uvicorn.error")


def _refused(reason: str) -> None:
    _LOG.info("a connection was closed: %s", reason)


Bounded = bounded(file_limit(), _refused)
