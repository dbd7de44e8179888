"""The lexical encoder: tf-idf over the terms of `words.terms`, folded into a short dense vector. Needs no model, only numpy.

Each term (a word, or a character n-gram where a script has no spaces between words) is hashed twice: into a wide table of document
frequencies, and by sign and column into `dim` numbers (the count sketch of Charikar et al., which keeps inner products in
expectation). One code path serves queries and passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import ModelError
from research_rl.pipeline import arrays
from research_rl.reward.words import terms

__all__ = ["LexicalEncoder"]

_TABLE = 1 << 20
_FILE = "idf.npy"
_Terms = npt.NDArray[np.uint64]


class LexicalEncoder:
    """Hashed tf-idf; `idf` has one weight a hash bucket, shape [2**20]."""

    def __init__(self, dim: int, idf: npt.NDArray[np.float32]) -> None:
        self._dim, self._idf = dim, idf

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @classmethod
    def fit(cls, batches: Iterable[Sequence[str]], dim: int) -> LexicalEncoder:
        """Return an encoder weighted by the document frequencies of these texts; memory stays flat."""
        frequency, documents = np.zeros(_TABLE, np.int64), 0
        for texts in batches:
            terms, _, _ = _count(texts)
            frequency += np.bincount((terms % _TABLE).astype(np.int64), minlength=_TABLE)
            documents += len(texts)
        # Smoothed as in scikit-learn: a term that no text has still gets a weight, and one that all have is not lost.
        return cls(dim, (np.log((1 + documents) / (1 + frequency)) + 1).astype(np.float32))

    @classmethod
    def load(cls, folder: Path) -> LexicalEncoder:
        """Read what `save` wrote. Raises ModelError."""
        try:
            idf: npt.NDArray[np.float32] = np.load(folder / _FILE, mmap_mode="r")
            dim = int((folder / "dim").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} is no lexical encoder ({error}); run the embed stage again") from None
        return cls(dim, idf)

    def save(self, folder: Path) -> None:
        """Write the encoder into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays.save(folder / _FILE, self._idf)
        (folder / "dim").write_text(f"{self._dim}\n")

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a query, shape [len(texts), dim]."""
        return self._encode(texts)

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a passage, shape [len(texts), dim]."""
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> Vectors:
        terms, documents, counts = _count(texts)
        # Sublinear: a word that is repeated ten times is not ten times as telling.
        weights = self._idf[(terms % _TABLE).astype(np.int64)] * (1 + np.log(counts))
        # Sign, column and bucket come from bits 62, 30 up and 0 up of one hash, so that they do not depend on each other.
        sign = 1 - 2 * ((terms >> np.uint64(62)) & np.uint64(1)).astype(np.float32)
        place = documents * self._dim + ((terms >> np.uint64(30)) % np.uint64(self._dim)).astype(np.int64)
        flat = np.bincount(place, weights * sign, minlength=len(texts) * self._dim)
        vectors = flat.reshape(len(texts), self._dim).astype(np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        # A text without any word has no direction: its vector stays zero.
        return vectors / np.maximum(norms, 1e-12)[:, None]


def _count(texts: Sequence[str]) -> tuple[_Terms, npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return each text's distinct terms: hash, index of the text, occurrences."""
    # Not `hash`, which differs from process to process.
    hashes = [[crc32(term.encode()) for term in terms(text)] for text in texts]
    lengths = np.fromiter(map(len, hashes), np.int64, len(hashes))
    flat = np.fromiter((term for text in hashes for term in text), np.uint64, int(lengths.sum()))
    return _distinct(_mix(flat), np.repeat(np.arange(len(texts)), lengths))


def _distinct(hashes: _Terms, owner: npt.NDArray[np.int64]) -> tuple[_Terms, npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    # Sorted by text, then by hash: equal terms of a text are neighbours, and one pass of numpy counts them.
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, len(hashes))).astype(np.float32)
    return hashes[starts], owner[starts], counts


def _mix(values: _Terms) -> _Terms:
    """Spread the bits of 32-bit checksums over 64 (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
