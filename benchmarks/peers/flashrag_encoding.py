"""Encoding as FlashRAG's index builder does it, in our own words: arrival order, fixed batches, float32.

Every batch is padded to its longest passage, pooled by the mean over its tokens and brought to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["encode"]


def encode(model: Any, tokenizer: Any, passages: Sequence[str], batch: int, max_tokens: int) -> np.ndarray:
    """Return one vector a passage, shape [len(passages), dim]; `model` is a transformers encoder in float32."""
    found: list[np.ndarray] = []
    for start in range(0, len(passages), batch):
        texts = [f"passage: {text}" for text in passages[start : start + batch]]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs, return_dict=True).last_hidden_state
            mask = inputs["attention_mask"]
            pooled = hidden.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1) / mask.sum(dim=1)[..., None]
            found.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
    return np.concatenate(found)
