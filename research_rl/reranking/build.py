"""The reranker's share of an index artifact: the model's files, what is recorded of them, and how long it reads. Opens no index."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.corpus.store import PassageStore
from research_rl.embedding import models
from research_rl.paths import cache_folder
from research_rl.pipeline.stages import Context
from research_rl.pipeline.work import Work
from research_rl.reranking import RERANKER, load_reranker

__all__ = ["copied", "measured"]

_SEARCHES = 5


def copied(context: Context, work: Work, own: dict[str, str]) -> dict[str, Any]:
    """Copy the model as a unit of `work` and return the facts that the index records; none for kind none.

    Raises ModelError for a model that is not found, or scores no pairs.
    """
    config = context.config.reranker
    if config.kind == "none":
        return {}
    from research_rl.embedding.sentence import number_format

    source = models.resolve(config, context.config.transfer, cache_folder(), context.workspace.root)

    def copy(target: Path) -> dict[str, Any]:
        models.copy_model(source, target)
        return {}

    work.unit(RERANKER, copy)
    facts: dict[str, Any] = {
        "kind": config.kind,
        "model": config.model if (config.model or "").startswith("pypi:") else Path(config.model or "").name,
        "model_sha256": models.tree_sha256(work.folder / RERANKER),
        "candidates": config.candidates,
        "budget_ms": config.budget_ms,
        "max_tokens": config.max_tokens,
        "batch_tokens": config.batch_tokens,
        "dtype": number_format(config.dtype),
    }
    return {RERANKER: {**facts, **({"source_files": own} if own else {})}}


def measured(folder: Path, facts: dict[str, Any], store: PassageStore, threads: int = 0) -> dict[str, float]:
    """Return how many milliseconds one query's candidates take, the median; nothing for an index without a reranker.

    The candidates are passages as they come in the corpus; a budget is left out. Raises ModelError for weights that do not score.
    """
    reranker = load_reranker(folder, facts, threads, budget=False)
    if reranker is None or not len(store):
        return {}
    taken: list[float] = []
    for number in range(_SEARCHES + 1):
        first = number * reranker.candidates % len(store)
        passages = list(store.get(range(first, min(first + reranker.candidates, len(store)))))
        started = time.perf_counter()
        reranker.order([passages[0].contents[:100]], [passages])
        taken.append(1000 * (time.perf_counter() - started))
    # Not the first, which also pays for threads and kernels that are chosen once.
    return {"rerank_ms": round(float(np.median(taken[1:])), 2)}
