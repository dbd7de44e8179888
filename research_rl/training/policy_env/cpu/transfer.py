"""Where weights are handed over between verl's trainer and vLLM. Knows one address, no library.

verl names the socket in /tmp after Ray's job id, which is 01000000 for the first job of every private Ray: two trainings
on one machine would feed each other's engine. A run's own token in the name keeps them apart.
"""

from __future__ import annotations

import os

from research_rl.training.run.variables import TOKEN_VARIABLE

__all__ = ["private_address"]


def private_address(address: str) -> str:
    """Return verl's `ipc://….sock` address with this run's token put into it."""
    return address.removesuffix(".sock") + f"-{os.environ[TOKEN_VARIABLE]}.sock"
