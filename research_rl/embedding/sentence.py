"""The sentence encoder: a sentence-transformers or plain transformers folder. Knows batches and number formats; knows no shard.

Queries are sorted by length and cut into batches so that padding costs less than another batch would. A passage is padded as its
own length says, whatever it is encoded with: its vector is then the same, bit for bit, in a new index and in one that is brought up
to date. On a CPU each batch runs on one thread: threads inside one small matrix product wait for each other, and on a busy machine
that costs several times the work. So vectors do not depend on how many threads there are. The transformer runs in bfloat16 where the
processor has matrix instructions for it; pooling and normalisation are always float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Encoded, Vectors
from research_rl.embedding.models import MODULES
from research_rl.embedding.threads import Threaded
from research_rl.errors import ModelError
from research_rl.process.cores import multiplies_bfloat16

__all__ = ["SentenceEncoder", "batches", "convert", "fast_bfloat16", "number_format", "own_batches"]

_BATCH_SHARE = 32
"""A further batch costs about as much as batch_tokens / 32 tokens (measured: 130 for 4,096 on e5-base's shape)."""
_STEP = 8
"""A passage is padded to the next multiple of it."""

Progress = Callable[[int], None]
Rows = npt.NDArray[np.int64]
Batch = tuple[Rows, int]


class SentenceEncoder(Threaded):
    """Encodes with a transformer and its pooling; see `load`."""

    def __init__(self, model: Any, facts: dict[str, Any], threads: int = 0) -> None:
        super().__init__(model.device, threads)
        self.facts = facts
        self._tokenizer, self._device = model.tokenizer, model.device
        self._pad = int(self._tokenizer.pad_token_id or 0)
        body, *head = model
        # Normalisation is ours, for it comes with a check that every vector has a finite length.
        self._body, self._head = body, [module for module in head if type(module).__name__ != "Normalize"]

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.facts["dim"])

    @classmethod
    def load(cls, folder: Path, facts: dict[str, Any], *, threads: int = 0, dtype: str | None = None) -> SentenceEncoder:
        """Open a model folder with settled or recorded facts (see `presets.settle`); `threads` 0 takes all cores.

        `dtype` is the number format at work where it is another than the facts'. Raises ModelError when the model is
        unusable, or pools or measures otherwise than the facts say.
        """
        import torch

        model = _open(folder, facts, "cuda" if torch.cuda.is_available() else "cpu")
        limit = min(int(facts["max_tokens"]), int(model.max_seq_length or facts["max_tokens"]))
        own = {"dim": int(model.get_embedding_dimension() or 0), "pooling": _pooling(model), "max_tokens": limit}
        for name in ("dim", "pooling"):
            if facts.get(name, own[name]) != own[name]:
                raise ModelError(
                    f"{folder} has {name} {own[name]!r}, but {facts[name]!r} is configured or was recorded with the vectors; "
                    "leave encoder.pooling at auto, or run the embed stage again"
                )
        normalises = any(type(module).__name__ == "Normalize" for module in model)
        convert(model, dtype or facts["dtype"])
        return cls(model, {**facts, **own, "normalised": facts["normalised"] or normalises}, threads)

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a query, shape [len(texts), dim]. Raises ModelError when one has no finite length."""
        return self._encode([self.facts["query_prefix"] + text for text in texts], batches, None).vectors

    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Return one vector a passage, shape [len(texts), dim]; `progress` is called with how many are done."""
        return self.encode(texts, progress).vectors

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Encoded:
        """Return the vectors of passages with what they cost."""
        cut = partial(own_batches, limit=self.facts["max_tokens"])
        return self._encode([self.facts["passage_prefix"] + text for text in texts], cut, progress)

    def _encode(self, texts: Sequence[str], cut: Callable[[Rows, int], Iterator[Batch]], progress: Progress | None) -> Encoded:
        if not texts:
            return Encoded(np.empty((0, self.dim), np.float32))
        ids: list[list[int]] = self._tokenizer(
            # The masks are made with the padding in `_forward`, which happens per batch and not per call.
            list(texts),
            truncation=True,
            max_length=self.facts["max_tokens"],
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        plan = list(cut(lengths, self.facts["batch_tokens"]))
        vectors, done = np.empty((len(texts), self.dim), np.float32), 0

        def forward(batch: Batch) -> tuple[Rows, Vectors]:
            rows, length = batch
            return rows, self._forward([ids[row] for row in rows], length)

        # Longest first, so that no core is left with the longest at the end.
        for rows, encoded in self._pool.map(forward, reversed(plan)):
            vectors[rows] = encoded
            done += len(rows)
            if progress:
                progress(done)
        tokens, computed = int(lengths.sum()), sum(len(rows) * length for rows, length in plan)
        return Encoded(self._measured(vectors), tokens, computed - tokens)

    def _forward(self, ids: list[list[int]], length: int) -> Vectors:
        import torch

        padded = np.full((len(ids), length), self._pad, np.int64)
        mask = np.zeros((len(ids), length), np.int64)
        left = self._tokenizer.padding_side == "left"
        for row, tokens in enumerate(ids):
            place = slice(length - len(tokens), length) if left else slice(0, len(tokens))
            padded[row, place], mask[row, place] = tokens, 1
        with torch.inference_mode():
            inputs = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}
            features = self._body({name: value.to(self._device) for name, value in inputs.items()})
            # Pooling and norms sum over many values, for which bfloat16 has too few digits.
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in self._head:
                features = module(features)
            return features["sentence_embedding"].cpu().numpy()

    def _measured(self, vectors: Vectors) -> Vectors:
        """Return the vectors at unit length where the facts say so. Raises ModelError for one without a finite length."""
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        if not (np.isfinite(norms) & (norms > 0)).all():
            bad = int(np.argmin(np.isfinite(norms) & (norms > 0)))
            raise ModelError(
                f"text {bad} of {len(vectors)} has a vector of length {norms[bad]}; the model's weights are damaged or overflow in "
                f"{self.facts['dtype']}; set encoder.dtype=float32 or take a whole model"
            )
        return vectors / norms[:, None] if self.facts["normalised"] else vectors


def batches(lengths: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[Batch]:
    """Yield batches as (rows, padded length), shortest first, each of at most `batch_tokens` tokens or one text.

    The steps between padded lengths are those of the least cost: tokens with padding, and a fixed price a batch.
    """
    order = np.argsort(lengths, kind="stable")
    steps, counts = np.unique(np.maximum(lengths, 1), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    for first, last in _groups(steps, ends, batch_tokens):
        yield from _parts(order[ends[first] : ends[last]], int(steps[last - 1]), batch_tokens)


def own_batches(lengths: npt.NDArray[np.int64], batch_tokens: int, *, limit: int) -> Iterator[Batch]:
    """Yield batches like `batches`, of texts that each their own length brings to the padded length; none is above `limit` tokens.

    Every text has padding, but for those of `limit` tokens, which are by themselves: without any, attention is computed otherwise.
    """
    padded = np.where(lengths < limit, np.minimum((lengths // _STEP + 1) * _STEP, limit), limit)
    groups = 2 * padded + (lengths >= limit)
    for group in np.unique(groups).tolist():
        yield from _parts(np.flatnonzero(groups == group), group // 2, batch_tokens)


def _parts(rows: Rows, length: int, batch_tokens: int) -> Iterator[Batch]:
    size = max(1, batch_tokens // length)
    # Equal parts: a last batch of a few texts would cost almost as much as a full one.
    for part in np.array_split(rows, -(-len(rows) // size)):
        yield part, length


def _groups(steps: Rows, ends: Rows, batch_tokens: int) -> list[tuple[int, int]]:
    """Cut the distinct lengths `steps` into groups (first, last + 1) of the least total cost."""
    best, origin = np.zeros(len(steps) + 1), np.zeros(len(steps) + 1, np.int64)
    for last in range(1, len(steps) + 1):
        # All groups that end at `last` at once: best[last] is the least cost of the texts up to there.
        rows, length = ends[last] - ends[:last], steps[last - 1]
        pieces = -(-rows // max(1, batch_tokens // length))
        costs = best[:last] + rows * length + pieces * (batch_tokens / _BATCH_SHARE)
        origin[last] = np.argmin(costs)
        best[last] = costs[origin[last]]
    groups: list[tuple[int, int]] = []
    last = len(steps)
    while last:
        groups.append((int(origin[last]), last))
        last = int(origin[last])
    return groups[::-1]


def fast_bfloat16() -> Literal["bfloat16", "float32"]:
    """Return the faster number format that keeps quality on this machine (bfloat16: cosine to float32 over 0.9998)."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if multiplies_bfloat16() else "float32"


def number_format(chosen: str) -> str:
    """Return the number format that `dtype` of a section asks for; `auto` is the faster one on this machine."""
    return fast_bfloat16() if chosen == "auto" else chosen


def _open(folder: Path, facts: dict[str, Any], device: str) -> Any:
    from research_rl.embedding.usual import open_usual

    try:
        model = open_usual(folder, facts.get("pooling", ""), device) or _open_any(folder, facts, device)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} is no usable sentence-transformers model ({reason}); set encoder.model to a whole one") from error
    return model.eval()


def _open_any(folder: Path, facts: dict[str, Any], device: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    kind: dict[str, Any] = {"dtype": torch.float32}
    if (folder / MODULES).is_file():
        return SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=kind)
    body = Transformer(str(folder), model_kwargs={**kind, "local_files_only": True})
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), facts["pooling"])], device=device)


def convert(model: Any, dtype: str) -> None:
    """Bring the transformer into the number format; what comes after it stays in float32."""
    import torch

    if dtype == "float32":
        return
    model[0].to(getattr(torch, dtype))
    if model.device.type == "cpu":
        from research_rl.embedding.packed import pack

        pack(model[0].model)


def _pooling(model: Any) -> str:
    """Return the pooling mode in the model's own words, such as `mean` or `cls`."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return "+".join(mode) if isinstance(mode, (list, tuple)) else str(mode)
    return "none"
