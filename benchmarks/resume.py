"""P7: share of the build done again after a kill at 50, 90 and 99 %: our files of rows against the peer's single pass."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np

from benchmarks.duel import Duel
from research_rl.config import IndexConfig
from research_rl.index import dense
from research_rl.index.kept import StandingFiles
from research_rl.index.vectors import VectorFiles
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.pipeline.work import Work

DIM, SHARD = 384, 7_000


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing handles it."""


def run(quick: bool) -> Iterator[Duel]:
    """Yield one duel a moment of the kill: rows added again. Ours is at most one file, and the ratio reckons with a whole one."""
    rows = 100_000 if quick else 500_000
    with tempfile.TemporaryDirectory() as folder:
        files = _vectors(Path(folder), rows)
        for share in (0.5, 0.9, 0.99):
            ours, peer = _ours(Path(folder) / str(share), files, share), _peer(files, share)
            assert ours <= SHARD, f"{ours:,} rows were added again, a file holds {SHARD:,}"
            yield Duel(
                "P7", f"rows added again after a kill at {share:.0%}, of {rows:,}", "rows", ours, peer, peer / max(ours, SHARD), 10, 1
            )


def _vectors(folder: Path, rows: int) -> VectorFiles:
    generator, paths = np.random.default_rng(0), []
    for start in range(0, rows, SHARD):
        paths.append(folder / f"vectors-{start}.npy")
        np.save(paths[-1], generator.standard_normal((min(SHARD, rows - start), DIM), dtype=np.float32))
    return VectorFiles(paths, DIM)


class _Counting(VectorFiles):
    """Vector files that count what is read, and stop the build when enough was."""

    def __init__(self, files: VectorFiles, stop: float) -> None:
        super().__init__(files.paths, files.dim)
        self.read, self._stop = 0, stop

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        for row, some in super().batches(start, stop, size):
            if self.read >= self._stop:
                raise Killed
            self.read += len(some)
            yield row, some


def _ours(root: Path, files: VectorFiles, share: float) -> int:
    """Return the rows read in both runs beyond those there are."""
    ranges = [(start, min(start + SHARD, len(files))) for start in range(0, len(files), SHARD)]
    context = SimpleNamespace(stage=STAGES["index"], config_hash="x", parents={}, workspace=Workspace(root))
    killed, resumed = _Counting(files, share * len(files)), _Counting(files, np.inf)
    for some in (killed, resumed):
        with contextlib.suppress(Killed):
            digests = {path: path.name for path in files.paths}
            dense.build(Work(context), IndexConfig(), some, ranges, lambda text, done: None, digests, StandingFiles({}))  # type: ignore[arg-type]
    return killed.read + resumed.read - len(files)


def _peer(files: VectorFiles, share: float) -> int:
    """The same for FlashRAG's pattern: all vectors into one index in memory, one file written at the end, nothing kept before."""
    done = 0
    for some in (_Counting(files, share * len(files)), _Counting(files, np.inf)):
        index = faiss.index_factory(DIM, "Flat", faiss.METRIC_INNER_PRODUCT)
        with contextlib.suppress(Killed):
            for _, vectors in some.batches(0, len(files), SHARD):
                index.add(vectors)
        done += some.read
    return done - len(files)
