"""The cross-encoder: a sentence-transformers folder that reads a query and a passage together. Knows batches; knows no index.

As with the sentence encoder, each batch runs on one thread of a CPU: see `embedding.sentence`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research_rl.embedding.sentence import batches, convert
from research_rl.embedding.threads import Threaded
from research_rl.errors import ModelError
from research_rl.reranking.order import Pair

__all__ = ["PairScorer"]

_LONGEST = 512
_CHARS_A_TOKEN = 3
"""Fewer than English texts have, so that a batch is rather too small than too large."""

Rows = npt.NDArray[np.int64]


class PairScorer(Threaded):
    """Scores pairs with a cross-encoder; see `load`."""

    def __init__(self, model: Any, facts: dict[str, Any], threads: int = 0) -> None:
        super().__init__(model.device, threads)
        self.facts = facts
        self._model = model
        self._preparing = threading.Lock()

    @classmethod
    def load(cls, folder: Path, facts: dict[str, Any], *, threads: int = 0) -> PairScorer:
        """Open a model folder; `facts` has max_tokens (None: the model's own), batch_tokens and dtype, `threads` 0 takes all cores.

        Raises ModelError for a folder that is no cross-encoder with one score a pair.
        """
        import torch

        model = _open(folder, "cuda" if torch.cuda.is_available() else "cpu")
        if model.num_labels != 1:
            raise ModelError(
                f"{folder} gives {model.num_labels} numbers a pair, a reranker gives one; set reranker.model to one for ranking"
            )
        own = min(_LONGEST, int(model.max_seq_length or _LONGEST))
        limit = min(own, int(facts["max_tokens"] or own))
        model.max_seq_length = limit
        convert(model, facts["dtype"])
        return cls(model, {**facts, "max_tokens": limit}, threads)

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Return one number a pair, in order: the model's output before any activation. Raises ModelError for one that is not finite."""
        scores = np.empty(len(pairs), np.float64)
        tokens = [min(self.facts["max_tokens"], sum(map(len, pair)) // _CHARS_A_TOKEN + 3) for pair in pairs]
        plan = [rows for rows, _ in batches(np.array(tokens, np.int64), self.facts["batch_tokens"])] if pairs else []

        def scored(rows: Rows) -> tuple[Rows, npt.NDArray[np.float64]]:
            return rows, self._scored([pairs[row] for row in rows])

        # Longest first, so that no core is left with the longest at the end.
        for rows, values in self._pool.map(scored, reversed(_shared(plan, self._threads))):
            scores[rows] = values
        if not np.isfinite(scores).all():
            bad = int(np.argmin(np.isfinite(scores)))
            raise ModelError(
                f"pair {bad} of {len(pairs)} scores {scores[bad]}; the reranker's weights are damaged or overflow in "
                f"{self.facts['dtype']}; set reranker.dtype=float32 or take a whole model"
            )
        return scores.tolist()

    def _scored(self, pairs: list[Pair]) -> npt.NDArray[np.float64]:
        import torch

        # The tokenizer keeps the length of its padding between calls, so no two threads may use it at once.
        with self._preparing:
            features = self._model.preprocess(pairs)
        features = {name: value.to(self._model.device) if isinstance(value, torch.Tensor) else value for name, value in features.items()}
        with torch.inference_mode():
            return self._model(features)["scores"].reshape(len(pairs)).double().cpu().numpy()


def _shared(plan: list[Rows], threads: int) -> list[Rows]:
    """Cut batches so that every thread has one: a few pairs make a single batch, which would leave the other cores idle."""
    pieces = -(-threads // max(1, len(plan)))
    return [piece for rows in plan for piece in np.array_split(rows, min(pieces, len(rows)))]


def _open(folder: Path, device: str) -> Any:
    import torch
    from sentence_transformers import CrossEncoder

    try:
        model: Any = CrossEncoder(str(folder), device=device, local_files_only=True, model_kwargs={"dtype": torch.float32})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} is no usable cross-encoder ({reason}); set reranker.model to a whole one") from error
    made: list[str] = getattr(model[0].model.config, "architectures", None) or ["a model of no named kind"]
    # Of a model without a head the library would make one up, at random.
    if len(model) == 1 and not made[0].endswith("ForSequenceClassification"):
        raise ModelError(
            f"{folder} holds {made[0]}, which scores no pairs; set reranker.model to a cross-encoder (encoder.model takes encoders)"
        )
    return model.eval()
