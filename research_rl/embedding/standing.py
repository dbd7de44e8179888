"""What a standing embeddings artifact spares a new one: the vectors of texts that it holds under the same encoder.

Knows keys and vector files; encodes nothing. Beside each vector file lies a file of keys: for every row the hash of the passage's
id and that of its text. Invariants: (1) a vector is taken only from whole files of the very same encoder; (2) texts count as equal by
128 bits of their hashes; (3) memory is `ROW_BYTES` a passage of the standing artifact, whatever its vectors take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from research_rl.embedding import ENCODER, Vectors
from research_rl.pipeline.manifest import Manifest, file_sha256

__all__ = ["KEY_BYTES", "ROW_BYTES", "Keys", "ShardPlan", "StandingVectors", "keys_name", "keys_of"]

Keys = npt.NDArray[np.uint64]
"""Shape [rows, 3]: hash of the id, and the two halves of the text's hash."""
Rows = npt.NDArray[np.int64]

KEY_BYTES = 24
ROW_BYTES = KEY_BYTES + 2 * 16
"""The key, and its place in the orders of ids and of texts with what they order by."""


def keys_name(number: int) -> str:
    """Return the file name of the keys that belong to vectors-NNNNN.npy."""
    return f"keys-{number:05d}.npy"


def keys_of(ids: Sequence[str], texts: Sequence[str]) -> Keys:
    """Return the keys of passages."""
    pairs = zip(ids, texts, strict=True)
    raw = b"".join(_digest(name, 8) + _digest(text, 16) for name, text in pairs)
    return np.frombuffer(raw, "<u8").reshape(-1, 3)


def _digest(text: str, size: int) -> bytes:
    return blake2b(text.encode(), digest_size=size).digest()


@dataclass(frozen=True)
class ShardPlan:
    """How one shard comes to its vectors: its keys, the standing row of each (-1: to be encoded), and what changed.

    `changes` counts passages: added, changed, reused, encoded, and `matched`, those whose id stands. `same` is a standing
    vector file that holds exactly these rows.
    """

    keys: Keys
    sources: Rows
    changes: dict[str, int]
    same: Path | None

    @property
    def missing(self) -> Rows:
        """Places in the shard, ascending, of the passages to be encoded."""
        return np.flatnonzero(self.sources < 0)


class StandingVectors:
    """Keys and vectors of an artifact, or of none: then everything is new. `files` are its vector files, empty where none can be used."""

    def __init__(self, keys: Keys, files: Sequence[Path] = ()) -> None:
        self._keys = keys
        # Mapped, and only while they are read: a pass over all of them must not stay in memory.
        self._files = list(files)
        self._starts = np.cumsum([0, *(len(_mapped(path)) for path in files)])
        self._by_id, self._by_text = (_Order(keys[:, column]) for column in (0, 1))

    @classmethod
    def of(cls, folder: Path, artifact: Manifest | None, encoder: Path, facts: dict[str, Any]) -> Self:
        """Open the artifact of `folder` for an encoder with these facts and files; `artifact` is its manifest, None where none stands.

        Its vectors count only where its encoder is the same, file by file.
        """
        parts = [] if artifact is None else [folder / entry.path for entry in artifact.files if entry.path.startswith("keys-")]
        if artifact is None or not parts:
            return cls(np.empty((0, 3), np.uint64))
        keys = np.concatenate([np.load(path) for path in parts])
        theirs = {entry.path: entry.sha256 for entry in artifact.files if entry.path.startswith(f"{ENCODER}/")}
        if artifact.facts["encoder"] != facts or theirs != _files(encoder):
            return cls(keys)
        return cls(keys, [path.with_name(path.name.replace("keys-", "vectors-")) for path in parts])

    def __len__(self) -> int:
        return len(self._keys)

    def plan(self, keys: Keys, start: int) -> ShardPlan:
        """Return the plan of a shard whose first row is `start`."""
        same_id = self._by_id.find(keys[:, 0])
        known, sources = same_id >= 0, self._sources(keys)
        unchanged = known.copy()
        unchanged[known] = (self._keys[same_id[known], 1:] == keys[known, 1:]).all(axis=1)
        reused = int((sources >= 0).sum())
        counts = {"added": int((~known).sum()), "changed": int((known & ~unchanged).sum()), "matched": int(known.sum())}
        return ShardPlan(keys, sources, {**counts, "reused": reused, "encoded": len(keys) - reused}, self._same(keys, start))

    def take(self, rows: Rows, dim: int) -> Vectors:
        """Return the standing vectors at `rows`, in any order, shape [len(rows), dim]."""
        vectors = np.empty((len(rows), dim), np.float32)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            vectors[mine] = _mapped(self._files[owner])[rows[mine] - self._starts[owner]]
        return vectors

    def _sources(self, keys: Keys) -> Rows:
        """Return the standing row of each text, -1 where its vector is not to be had."""
        if not self._files:
            return np.full(len(keys), -1, np.int64)
        rows = self._by_text.find(keys[:, 1])
        # Half a hash found the row, the other half says whether it is the same text.
        rows[(rows >= 0) & (self._keys[rows, 2] != keys[:, 2])] = -1
        return rows

    def _same(self, keys: Keys, start: int) -> Path | None:
        place = int(np.searchsorted(self._starts, start))
        if place >= len(self._files) or self._starts[place] != start:
            return None
        standing = self._keys[start : self._starts[place + 1], 1:]
        return self._files[place] if np.array_equal(standing, keys[:, 1:]) else None


class _Order:
    """Finds the first row that holds a value."""

    def __init__(self, values: npt.NDArray[np.uint64]) -> None:
        self._rows = np.argsort(values, kind="stable")
        self._values = values[self._rows]

    def find(self, values: npt.NDArray[np.uint64]) -> Rows:
        """Return the row of each value, -1 where there is none."""
        if not len(self._values):
            return np.full(len(values), -1, np.int64)
        places = np.minimum(np.searchsorted(self._values, values), len(self._values) - 1)
        return np.where(self._values[places] == values, self._rows[places], -1)


def _files(encoder: Path) -> dict[str, str]:
    paths = (path for path in encoder.rglob("*") if path.is_file())
    return {f"{ENCODER}/{path.relative_to(encoder).as_posix()}": file_sha256(path) for path in paths}


def _mapped(path: Path) -> Vectors:
    return np.load(path, mmap_mode="r")
