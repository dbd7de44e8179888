"""Files that a running service has mapped into memory. Knows their sizes; knows no content.

A mapped file that is cut short ends the process at its next read (SIGBUS) without a message; `check` finds it before that where it can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from research_rl.errors import ManifestError

__all__ = ["OpenedFiles"]

_EVERY_S = 0.2


class OpenedFiles:
    """Holds the files open, so that one that was replaced by a new build is not taken for one that was cut short."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = [(path, os.open(path, os.O_RDONLY)) for path in paths]
        self._sizes = [os.fstat(handle).st_size for _, handle in self._files]
        self._next = 0.0

    def check(self) -> None:
        """Compare the sizes with those at the start, at most every 0.2 s. Raises ManifestError for a file that became shorter."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + _EVERY_S
        for (path, handle), size in zip(self._files, self._sizes, strict=True):
            if (left := os.fstat(handle).st_size) < size:
                raise ManifestError(
                    f"{path} was cut to {left:,} bytes of {size:,} while it was served; "
                    f"remove {path.parent}, build it again and start the retriever again"
                )

    def close(self) -> None:
        """Close the files."""
        for _, handle in self._files:
            os.close(handle)
        self._files, self._sizes = [], []
