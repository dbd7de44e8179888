"""Merge a low-rank adapter into the weights it was trained beside. Knows peft's names in a verl checkpoint; needs no torch.

verl writes a policy with an adapter as peft holds it: `base_model.model.<name>`, an adapted layer's own weight under `.base_layer.`, its
factors under `.lora_A.` and `.lora_B.`, and rank and alpha beside the folder in `lora_train_meta.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.errors import ModelError
from research_rl.serving.tensors import Tensor, floats, tensors

__all__ = ["META", "Adapter", "adapters", "is_factor", "plain"]

META = "lora_train_meta.json"
_FACTOR = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")


@dataclass(frozen=True)
class Adapter:
    """What is added to one weight [out, in]: `scale` * B [out, rank] @ A [rank, in]."""

    a: Tensor
    b: Tensor
    scale: float

    def merged(self, weight: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the adapted weight in float32. Raises ModelError when the shapes do not fit."""
        (rank, inner), (outer, columns) = self.a.shape, self.b.shape
        if weight.shape != (outer, inner) or rank != columns:
            raise ModelError(f"the adapter {self.b.shape} @ {self.a.shape} does not fit {weight.name} of shape {weight.shape}; train again")
        return floats(weight) + np.float32(self.scale) * (floats(self.b) @ floats(self.a))


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return _FACTOR.search(name) is not None


def plain(name: str) -> str:
    """Return a tensor's name in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def adapters(folder: Path) -> dict[str, Adapter]:
    """Return the adapters of a checkpoint's Hugging Face folder by the plain name of the weight; empty without any.

    Raises ModelError when a factor, or the file with rank and alpha, is missing.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(folder).items():
        if match := _FACTOR.search(name):
            factors.setdefault(f"{plain(name[: match.start()])}.weight", {})[match[1]] = tensor
    if not factors:
        return {}
    scale = _scale(folder.parent / META)
    if single := next((name for name, pair in factors.items() if len(pair) != 2), None):
        raise ModelError(f"{folder} holds one factor of the adapter of {single}, two are needed; train again")
    return {name: Adapter(pair["A"], pair["B"], scale) for name, pair in factors.items()}


def _scale(path: Path) -> float:
    try:
        adapter = json.loads(path.read_text(encoding="utf-8"))
        return float(adapter["lora_alpha"]) / float(adapter["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{path} does not tell the adapter's rank and alpha ({error}); without them it cannot be merged") from error
