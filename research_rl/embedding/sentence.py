"""The sentence encoder: any sentence-transformers folder. Knows batches and number formats; knows no corpus, no shard.

Texts are sorted into buckets of equal padded length. On a CPU each core works on batches of its own with one thread:
threads inside one small matrix product wait for each other, and on a busy machine that costs several times the work.
Passages are encoded in bfloat16 where the processor has matrix instructions for it; queries stay in float32.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import ModelError

__all__ = ["SentenceEncoder", "buckets", "fast_bfloat16"]

_STEP = 16
"""Padded lengths are multiples of this."""

Progress = Callable[[int], None]
Rows = npt.NDArray[np.int64]
Batch = tuple[Rows, int]


class SentenceEncoder:
    """Encodes with a sentence-transformers model; see `load`."""

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self._models, self.facts = {"float32": model}, facts
        self._tokenizer, self._device = model.tokenizer, model.device

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.facts["dim"])

    @classmethod
    def load(cls, folder: Path, facts: dict[str, Any]) -> SentenceEncoder:
        """Open a model folder with recorded facts: prefixes, max_tokens, batch_tokens, dtype. Raises ModelError."""
        import torch
        from sentence_transformers import SentenceTransformer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs={"dtype": torch.float32})
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{folder} is no usable sentence-transformers model ({reason}); set encoder.model to a whole one") from error
        model.eval()
        dim = int(model.get_embedding_dimension() or 0)
        limit = min(int(facts["max_tokens"]), int(model.max_seq_length or facts["max_tokens"]))
        return cls(model, {**facts, "dim": dim, "max_tokens": limit, "pooling": _pooling(model)})

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a query, shape [len(texts), dim]."""
        return self._encode([self.facts["query_prefix"] + text for text in texts], "float32", None)

    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Return one vector a passage, shape [len(texts), dim]; `progress` hears how many are done."""
        return self._encode([self.facts["passage_prefix"] + text for text in texts], self.facts["dtype"], progress)

    def _encode(self, texts: Sequence[str], dtype: str, progress: Progress | None) -> Vectors:
        ids: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self.facts["max_tokens"])["input_ids"]
        vectors, done = np.empty((len(texts), self.dim), np.float32), 0
        model = self._in(dtype)

        def forward(batch: tuple[Rows, int]) -> tuple[Rows, Vectors]:
            rows, length = batch
            return rows, self._forward(model, [ids[row] for row in rows], length)

        for rows, found in self._each(forward, list(buckets([len(row) for row in ids], self.facts["batch_tokens"]))):
            vectors[rows] = found
            done += len(rows)
            if progress:
                progress(done)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _each(self, forward: Callable[[Batch], tuple[Rows, Vectors]], batches: list[Batch]) -> Iterator[tuple[Rows, Vectors]]:
        """Run batches, longest first so that no core is left with the longest at the end; one batch stays in this thread."""
        if len(batches) == 1 or self._device.type != "cpu":
            yield from map(forward, batches)
            return
        import torch

        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(forward, reversed(batches))

    def _forward(self, model: Any, ids: list[list[int]], length: int) -> Vectors:
        import torch

        padded = self._tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=length, return_tensors="pt")
        with torch.inference_mode():
            found = model({name: value.to(self._device) for name, value in padded.items()})["sentence_embedding"]
        return found.float().cpu().numpy()

    def _in(self, dtype: str) -> Any:
        """Return the model in a number format, converted at first use."""
        if dtype not in self._models:
            import torch

            self._models[dtype] = copy.deepcopy(self._models["float32"]).to(getattr(torch, dtype))
        return self._models[dtype]


def buckets(lengths: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """Yield batches as (rows, padded length): one padded length each, at most `batch_tokens` tokens, shortest first."""
    padded = -(-np.asarray(lengths, dtype=np.int64) // _STEP) * _STEP
    order = np.argsort(padded, kind="stable")
    for length in np.unique(padded):
        rows = order[padded[order] == length]
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(rows), size):
            yield rows[start : start + size], int(length)


def fast_bfloat16() -> Literal["bfloat16", "float32"]:
    """Return the faster number format that keeps quality on this machine (bfloat16: cosine to float32 over 0.9998)."""
    import torch

    cpu = Path("/proc/cpuinfo")
    amx = cpu.is_file() and " amx_bf16" in cpu.read_text(errors="replace")
    return "bfloat16" if torch.cuda.is_available() or amx else "float32"


def _pooling(model: Any) -> str:
    """Return the pooling mode in the model's own words, such as `mean` or `cls`."""
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return "+".join(mode) if isinstance(mode, (list, tuple)) else str(mode)
    return "none"
