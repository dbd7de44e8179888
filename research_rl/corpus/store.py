"""Passages on disk as memory-mapped Arrow shards. Knows rows, ids and text; knows no vector, no stage.

Invariants: (1) every shard but the last holds `shard_rows` rows in one record batch, so a row's place is a division;
(2) an id is found through a bucket table in constant expected time; (3) no list of all texts or ids exists anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from research_rl.episode.trajectory import Passage
from research_rl.errors import ManifestError
from research_rl.pipeline import arrays, manifest
from research_rl.pipeline.manifest import Manifest

__all__ = ["PassageStore", "shard_name", "write_shard", "write_table"]

Hashes = npt.NDArray[np.uint64]

_OFFSETS, _ROWS = "id-offsets.npy", "id-rows.npy"
_MARK, _STREAM = b"ARROW1", 8
"""How a file begins and ends, and where its stream begins."""
# Offsets of 64 bits: the texts of a shard may exceed the 2 GiB that an array of `string` can hold.
_SCHEMA = pa.schema({"id": pa.large_string(), "contents": pa.large_string()})


class PassageStore:
    """Read access to a corpus artifact; safe to share between threads, cheap to open at any size.

    Raises ManifestError when the folder is no whole corpus artifact. Shards are mapped at their first use.
    """

    def __init__(self, folder: Path, artifact: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = artifact or manifest.load(folder, verify=False)
        if self.manifest.stage != "corpus":
            raise ManifestError(f"{folder} holds stage {self.manifest.stage}, not a corpus; name the folder artifacts/corpus")
        self._rows = self.manifest.counts["passages"]
        self._shard_rows = int(self.manifest.facts["shard_rows"])
        self._shards: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._offsets: npt.NDArray[np.int64] = np.load(folder / _OFFSETS, mmap_mode="r")
        self._order: npt.NDArray[np.int64] = np.load(folder / _ROWS, mmap_mode="r")

    def __len__(self) -> int:
        return self._rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self._rows // self._shard_rows)

    def map_shards(self) -> None:
        """Map every shard now, so that a newer corpus in this folder changes nothing. Raises ManifestError."""
        for number in range(self.shards):
            self._shard(number)

    def get(self, rows: Iterable[int]) -> list[Passage]:
        """Return the passages at `rows`, in that order, scores 0. Raises IndexError outside 0 to len - 1."""
        return [self._passage(int(row)) for row in rows]

    def row_of(self, identifier: str) -> int | None:
        """Return the row of an id, None when there is none."""
        bucket = _hash(identifier) % (len(self._offsets) - 1)
        for row in self._order[self._offsets[bucket] : self._offsets[bucket + 1]]:
            if self._passage(int(row)).id == identifier:
                return int(row)
        return None

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the contents of rows `start` to `stop` - 1."""
        return [text for batch in self._batches(start, stop) for text in batch.column(1).to_pylist()]

    def columns(self, start: int, stop: int) -> tuple[list[str], list[str]]:
        """Return ids and contents of rows `start` to `stop` - 1."""
        ids, contents = list[str](), list[str]()
        for batch in self._batches(start, stop):
            ids += batch.column(0).to_pylist()
            contents += batch.column(1).to_pylist()
        return ids, contents

    def batches(self, size: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the first row and the contents of consecutive batches of up to `size` passages."""
        for start in range(0, self._rows, size):
            yield start, self.texts(start, start + size)

    def _batches(self, start: int, stop: int) -> Iterator[Any]:
        """Yield what each shard holds of the rows `start` to `stop` - 1."""
        while start < min(stop, self._rows):
            shard, place = divmod(start, self._shard_rows)
            count = min(stop - start, self._shard_rows - place)
            # A map of its own, closed at once: a pass over the corpus must not keep all of it in resident memory.
            batch = self._map(self.folder / shard_name(shard)).slice(place, count)
            yield batch
            start += len(batch)

    def _passage(self, row: int) -> Passage:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} is outside the {self._rows} passages of {self.folder}")
        shard, place = divmod(row, self._shard_rows)
        batch = self._shard(shard)
        return Passage(batch.column(0)[place].as_py(), batch.column(1)[place].as_py())

    def _shard(self, number: int) -> Any:
        shard = self._shards.get(number)
        if shard is None:
            with self._lock:
                # Asked again under the lock: another thread may have mapped it meanwhile.
                shard = self._shards.get(number) or self._map(self.folder / shard_name(number))
                self._shards[number] = shard
        return shard

    def _map(self, path: Path) -> Any:
        try:
            # Only the file is closed at the end of the block; the batch keeps the mapped pages for as long as it lives.
            with pa.memory_map(str(path)) as source:
                return _only_batch(source)
        except (OSError, pa.ArrowInvalid) as error:
            raise ManifestError(f"{path} cannot be read ({error}); remove {self.folder} and rerun") from None


def _only_batch(source: Any) -> Any:
    """Return the record batch of a shard, in place. Raises ArrowInvalid."""
    if source.read(len(_MARK)) != _MARK or source.read_at(len(_MARK), max(0, source.size() - len(_MARK))) != _MARK:
        raise pa.ArrowInvalid("it does not begin and end as an Arrow file")
    # As the stream that a file is between its marks: the reader of files begins threads, with which a process cannot well be forked.
    source.seek(_STREAM)
    with pa.ipc.open_stream(source) as stream:
        for batch in stream:
            return batch
    raise pa.ArrowInvalid("it holds no rows")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"passages-{number:05d}.arrow"


def write_shard(ids: Any, contents: Any, path: Path) -> Hashes:
    """Write two Arrow columns of strings as one shard; return the hash of every id, which `write_table` needs."""
    columns = [ids.cast(pa.large_string()).combine_chunks(), contents.cast(pa.large_string()).combine_chunks()]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return np.fromiter(map(_hash, ids.to_pylist()), np.uint64, len(ids))


def write_table(hashes: Hashes, folder: Path) -> None:
    """Write rows grouped by bucket, and where each bucket starts; about one row a bucket."""
    buckets = max(1, len(hashes))
    bucket = (hashes % np.uint64(buckets)).astype(np.int64)
    arrays.save(folder / _ROWS, np.argsort(bucket, kind="stable"))
    arrays.save(folder / _OFFSETS, np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=buckets))]).astype(np.int64))


def _hash(identifier: str) -> int:
    # Not `hash`, which differs from process to process: the table is searched by others than the one that wrote it.
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little")
