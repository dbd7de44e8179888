"""What `index.factory=auto` stands for: the most exact index that the service can hold. Knows sizes; touches no data.

In this order: the exact scan; one-bit codes (RaBitQ) in memory and full vectors on disk; the same with inverted lists, of which a
query reads a share, so that the codes may stay on disk, too.
"""

from __future__ import annotations

from research_rl.config import EncoderConfig, IndexConfig
from research_rl.index import budget
from research_rl.index.search import EXACT

__all__ = ["AUTO", "settled"]

AUTO = "auto"
_LISTS = 4096
_TRAINED_EACH = 39
"""Vectors that faiss wants for each list when it trains them."""
_PROBED, _LEAST_PROBED = 8, 4
"""One list of so many is read, but at least four."""


def settled(config: IndexConfig, encoder: EncoderConfig, memory_gib: float, dim: int, rows: int) -> IndexConfig:
    """Return the section with `factory`, `search` and `refine` as they take effect for `rows` vectors of `dim`."""
    if config.factory != AUTO or config.kind == "bm25" or config.prebuilt:
        return config.model_copy(update={"refine": bool(config.refine)})
    codes, lists = _codes(config, dim), _lists(config, dim, rows)
    exact = [] if config.refine else [config.model_copy(update={"factory": EXACT, "refine": False})]
    held = (choice for choice in [*exact, codes] if budget.served(choice, encoder, dim, rows) <= memory_gib * 1024**3)
    return next(held, lists)


def _codes(config: IndexConfig, dim: int) -> IndexConfig:
    return config.model_copy(update={"factory": f"RR{dim},RaBitQfs", "refine": True, "device": "cpu"})


def _lists(config: IndexConfig, dim: int, rows: int) -> IndexConfig:
    """Return lists of RaBitQ's plain codes: faiss maps these, while it copies those for FastScan into memory."""
    most = max(1, min(rows, config.train_rows) // _TRAINED_EACH)
    count = min(_LISTS, 1 << (most.bit_length() - 1))
    search = config.search or f"nprobe={max(_LEAST_PROBED, count // _PROBED)}"
    return config.model_copy(update={"factory": f"RR{dim},IVF{count},RaBitQ", "search": search, "refine": True, "device": "cpu"})
