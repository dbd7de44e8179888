"""What the workers of one service share besides the index: counts, the state of the exchange, who is there. Knows files; knows no search.

The counts are in prometheus_client's way for several processes: each keeps its own in mapped files of a common folder.

Invariants: (1) what a worker counted is still counted when it has ended; (2) no reading sees a count twice or not at all; (3) a worker
that is killed leaves no lock held.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from research_rl.process.board import Board

__all__ = ["COUNTS", "Whole"]

COUNTS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable by which prometheus_client counts in files; read when it is imported."""
_STATE = "state.json"
_ENDED = "0"
"""In place of a process's number: the counts of all that ended."""


class Whole:
    """The service as a whole, seen from one of its processes; `folder` is the service's own, and empty at its start."""

    def __init__(self, folder: Path, board: Board) -> None:
        self.folder, self._board = folder, board

    def retrievers(self) -> dict[str, int]:
        """Return how many workers answer and how many of them have nothing to do, as they said within the last second."""
        total, idle = self._board.counts()
        return {"total": total, "available": idle}

    def tell(self, **state: Any) -> None:
        """Say how the exchange of the index goes: `switches`, `failures`, `failed`."""
        partial = self.folder / f".{_STATE}"
        partial.write_text(json.dumps(state))
        partial.replace(self.folder / _STATE)

    @property
    def switches(self) -> int:
        """Indexes taken into service after the first."""
        return self._state()["switches"]

    @property
    def failures(self) -> int:
        """Times that an index could not be opened."""
        return self._state()["failures"]

    @property
    def failed(self) -> dict[str, Any] | None:
        """The index that could not be opened, when and why; None once one could."""
        return self._state()["failed"]

    def text(self) -> bytes:
        """Return the counts of all workers in Prometheus's text format."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self.folder))
        with self.locked("counts", fcntl.LOCK_SH):
            return generate_latest(registry)

    def ended(self, pid: int) -> None:
        """Add the counts of a worker that ended to those of all that did, and drop its gauges."""
        with self.locked("counts"):
            for path in self.folder.glob(f"*_{pid}.db"):
                if not path.name.startswith("gauge"):
                    _add(path, path.with_name(f"{path.name.split('_')[0]}_{_ENDED}.db"))
                path.unlink()

    @contextmanager
    def locked(self, name: str, kind: int = fcntl.LOCK_EX) -> Generator[None]:
        """Hold a lock of the service, which ends with this process at the latest."""
        # Opened each time: an open file that forks share is locked for all of them.
        handle = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)

    def _state(self) -> dict[str, Any]:
        return json.loads((self.folder / _STATE).read_text())


def _add(path: Path, total: Path) -> None:
    counts = MmapedDict(str(total))
    for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
        counts.write_value(key, counts.read_value(key)[0] + value, 0.0)
    counts.close()
