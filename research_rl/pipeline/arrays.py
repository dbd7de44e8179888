"""Arrays written so that a full disk is an error.

NumPy's own writers leave the last 4 KiB to C's `fclose` and pass over its failure: what is on the disk is torn, and nobody is told.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = ["append", "save"]


class _Stream:
    """Hides from NumPy that this is a file; it writes through Python then, 16 MiB at a time."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.write = stream.write


def save(path: Path, array: npt.NDArray[Any]) -> None:
    """Write what `numpy.save` would, at `path`, which names its own ending. Raises OSError when it is not all on the disk."""
    with path.open("wb") as stream:
        np.lib.format.write_array(_Stream(stream), array, allow_pickle=False)  # pyright: ignore[reportArgumentType] (only write is used)


def append(stream: IO[bytes], array: npt.NDArray[Any]) -> None:
    """Write the numbers alone, as `ndarray.tofile` would. Raises OSError, at the latest when the stream is closed."""
    stream.write(np.ascontiguousarray(array).data)
