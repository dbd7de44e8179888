"""Rerankers: what puts the first passages of an index in a new order. Heavy libraries load with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from research_rl.reranking.order import Reranker

__all__ = ["RERANKER", "Reranker", "load_reranker"]

RERANKER = "reranker"
"""Folder of the reranker's own files inside an index artifact, and the fact of its manifest that describes it."""


def load_reranker(folder: Path, facts: dict[str, Any], threads: int = 0, *, budget: bool = True) -> Reranker | None:
    """Return the reranker of the index artifact in `folder`, None where its facts name none; `threads` 0 takes all cores.

    Without `budget` it reads all candidates, however long that takes. Raises ModelError.
    """
    if RERANKER not in facts:
        return None
    # Imported here: an index without a reranker needs no torch.
    from research_rl.embedding.sentence import fast_bfloat16
    from research_rl.reranking.cross_encoder import PairScorer

    own: dict[str, Any] = facts[RERANKER]
    # The index may have been built on another machine; bfloat16 without instructions for it would be slower than float32.
    dtype = "float32" if own["dtype"] == "bfloat16" and fast_bfloat16() == "float32" else own["dtype"]
    scorer = PairScorer.load(folder / RERANKER, {**own, "dtype": dtype}, threads=threads)
    return Reranker(scorer, own["candidates"], own["budget_ms"] if budget else None)
