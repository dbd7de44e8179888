"""How far the score of a code can lie below the true inner product. Knows faiss's codes; searches nothing.

With x a row, x' what its code stands for and q a query, the error of a score is <q - c, x' - x>, c the centre of the codes (0 but for
RaBitQ, whose score holds the part along the centre exactly: Gao and Long, RaBitQ, SIGMOD 2024, section 3). Two bounds of it:

proven: ||q - c|| ||x' - x|| (Cauchy-Schwarz), with the largest residual ||x' - x|| of all rows, measured while the codes were made.
probable: for codes behind a random rotation the direction of x' - x, given its length, is uniform in the space orthogonal to x - c
    (Gao and Long, theorem 3.2 and its proof), so it lies within t of the query's with probability 1 - exp(-(d - 1) t^2 / 2) or
    more (a spherical cap: Ball, An Elementary Introduction to Modern Convex Geometry, 1997, lemma 2.2). t is chosen so that all rows
    of the index together fail with probability `RISK` at most; the chance is that of the rotation, drawn before any vector was seen.

FastScan rounds the query to `qb` bits and its tables to 8: both are bounded by half a step a number, see `_scan_error`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import faiss
import numpy as np

from research_rl.embedding import Vectors
from research_rl.index.rescore import SUM

__all__ = ["KINDS", "RISK", "Bound", "Kind", "filled", "measured"]

Kind = Literal["proven", "probable"]
KINDS: tuple[Kind, ...] = ("proven", "probable")

RISK = 1e-6
"""Probability at most that a probable bound fails for any row of a query."""
_TABLE = 4
"""Numbers of a vector that one FastScan table stands for."""
_NAMES = ("residual", "length", "norm")
_NEAR = 1e-5
"""Squared distance from the centre below which faiss's codes stand for another vector (it does not divide by less than 1.2e-7)."""


class Bound:
    """The bound for one index; `facts` are the maxima over its files, as `measured` returned them."""

    def __init__(self, index: Any, facts: Mapping[str, float], rows: int) -> None:
        self._facts, self._rows = facts, rows
        rotation, codes = _parts(index)
        # Copies: the index may be closed before the bound is.
        self._matrix = None if rotation is None else faiss.vector_to_array(rotation.A).reshape(rotation.d_out, rotation.d_in)
        self._centre = faiss.vector_to_array(codes.center) if isinstance(codes, faiss.IndexRaBitQFastScan) else None
        self._qb = codes.qb if self._centre is not None else 0
        turned = self._centre is not None and isinstance(rotation, faiss.RandomRotationMatrix)
        self.kinds = KINDS if turned else KINDS[:1]

    @classmethod
    def of(cls, index: Any, records: Sequence[Mapping[str, float]], rows: int) -> Bound | None:
        """Return the bound of an index by the records of its files; None where its codes have none."""
        if not records or any(name not in record for record in records for name in _NAMES):
            return None
        return cls(index, {name: max(record[name] for record in records) for name in _NAMES}, rows)

    def margin(self, queries: Vectors, kind: Kind) -> Vectors:
        """Return for each query [n] what a row's exact score can lie above its code's score; infinite where the kind is not known."""
        if kind not in self.kinds:
            return np.full(len(queries), np.inf, np.float32)
        moved = queries if self._matrix is None else queries @ self._matrix.T
        summed = 2 * SUM * np.linalg.norm(queries, axis=1) * (self._facts["norm"] + self._facts["length"])
        if self._centre is None:
            return np.linalg.norm(moved, axis=1) * self._facts["residual"] + summed
        offset = moved - self._centre
        # The score's part along the centre is a difference of squares, each summed in float32.
        summed += 2 * SUM * (np.linalg.norm(offset, axis=1) + 1) * (self._facts["norm"] + self._facts["length"] + 1)
        turned = self._turned(queries.shape[1]) if kind == "probable" else 1.0
        return turned * np.linalg.norm(offset, axis=1) * self._facts["residual"] + self._scan_error(offset) + summed

    def _turned(self, dim: int) -> float:
        """Return t of the probable bound; never above 1, where the proven one holds."""
        return min(1.0, float(np.sqrt(2 * np.log(max(self._rows, 1) / RISK) / max(dim - 1, 1))))

    def _scan_error(self, offset: Vectors) -> Vectors:
        """Return for each query what rounding it (to `qb` bits) and the tables of sums over four numbers (to 8) can change in a score."""
        dim = offset.shape[1]
        step = (offset.max(axis=1) - offset.min(axis=1)) / (2**self._qb - 1)
        padded = np.pad(np.abs(offset), ((0, 0), (0, -dim % _TABLE)))
        spans = padded.reshape(len(offset), -1, _TABLE).sum(axis=2) + _TABLE * step[:, None]
        # One scale for all tables: the widest fills 8 bits, and all together stay within 16.
        scale = np.maximum(spans.max(axis=1) / 255, spans.sum(axis=1) / 65535)
        # A number of x' - c is +-length / sqrt(d); a table holds the query's sums times two of it.
        return self._facts["length"] / np.sqrt(dim) * (dim * step / 2 + (spans.shape[1] + 1) * scale)


def filled(index: Any, batches: Iterable[Vectors]) -> dict[str, float]:
    """Add rows to an index; return their largest residual, length of a code's vector (from the centre) and norm.

    Nothing is returned for codes without a bound. Every row is read and rotated once, for its code and for its figures.
    """
    rotation, codes = _parts(index)
    if codes is None:
        for batch in batches:
            index.add(batch)
        return {}

    def added(moved: Vectors) -> None:
        codes.add(moved)
        # Only the rotation of the index was passed over, and its count of rows.
        index.ntotal = codes.ntotal

    return _largest(rotation, codes, batches, added)


def measured(index: Any, batches: Iterable[Vectors]) -> dict[str, float]:
    """Return what `filled` does for rows that are in an index already."""
    rotation, codes = _parts(index)
    return {} if codes is None else _largest(rotation, codes, batches, lambda moved: None)


def _largest(rotation: Any, codes: Any, batches: Iterable[Vectors], use: Callable[[Vectors], None]) -> dict[str, float]:
    """Return the largest of what `_extents` says of any row, and hand each batch, rotated, to `use`."""
    centre = faiss.vector_to_array(codes.center) if isinstance(codes, faiss.IndexRaBitQFastScan) else np.float32(0)
    largest = np.zeros(len(_NAMES))
    for batch in batches:
        moved = _applied(rotation, batch)
        use(moved)
        largest = np.maximum(largest, [extent.max() for extent in (*_extents(codes, moved, centre), _norms(batch))])
    # Rounded up by more than a float32 sum can be off.
    return {name: float(value) * (1 + SUM) for name, value in zip(_NAMES, largest, strict=True)}


def _extents(codes: Any, moved: Vectors, centre: Vectors | np.float32) -> tuple[Vectors, Vectors]:
    """Return for each row the length of its residual, and that of its code's vector, both shape [n]."""
    if isinstance(codes, faiss.IndexRaBitQFastScan) and codes.rabitq.nb_bits == 1:  # pyright: ignore[reportAttributeAccessIssue]
        offset = moved - centre
        squared = np.einsum("nd,nd->n", offset, offset)
        if squared.min() > _NEAR:
            # A code of signs stands for the vector along them whose product with x - c is the square of x - c. Reckoned so it takes
            # a third of the time that decoding does.
            lengths = squared * np.float32(np.sqrt(offset.shape[1])) / np.abs(offset, out=offset).sum(axis=1)
            return np.sqrt(np.maximum(lengths**2 - squared, 0)), lengths
    decoded = codes.sa_decode(codes.sa_encode(moved))
    return _norms(decoded - moved), _norms(decoded - centre)


def _norms(vectors: Vectors) -> Vectors:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors))


def _parts(index: Any) -> tuple[Any, Any]:
    """Return the rotation before the codes, if any, and the codes; (None, None) for codes whose error is not known here.

    Known are RaBitQ by FastScan, and codes compared in float32 by what they stand for. Lists leave rows out, whatever their codes say.
    """
    rotation: Any = None
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        if chain.size() != 1:
            return None, None
        rotation = faiss.downcast_VectorTransform(chain.at(0))
        # Only what keeps inner products.
        if not isinstance(rotation, faiss.RandomRotationMatrix | faiss.OPQMatrix) or rotation.d_in != rotation.d_out:
            return None, None
        index = faiss.downcast_index(index.index)
    known = isinstance(index, faiss.IndexRaBitQFastScan | faiss.IndexScalarQuantizer | faiss.IndexPQ)
    return (rotation, index) if known else (None, None)


def _applied(rotation: Any, vectors: Vectors) -> Vectors:
    vectors = np.ascontiguousarray(vectors, np.float32)
    return vectors if rotation is None else rotation.apply(vectors)
