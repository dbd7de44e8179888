"""Opens a sentence-transformers folder of the usual kind by transformers alone: a BERT-like model, then mean or first token.

sentence-transformers imports scikit-learn, SciPy and pandas first, a quarter of what a service takes until its first answer. Vectors are
the same, bit for bit; a folder of any other kind is left to it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from research_rl.embedding.models import MODULES
from research_rl.embedding.packed import FAMILIES
from research_rl.errors import ModelError
from research_rl.pipeline.json_files import parse, read_object

__all__ = ["UsualModel", "open_usual"]

_POOLINGS = ("mean", "cls")
_SETTINGS = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "do_lower_case": (False,),
}
"""What the settings of the transformer may say, besides its longest text."""
_AGAIN = "download the model again"


class UsualModel(torch.nn.Sequential):
    """Body and pooling, with those names of a SentenceTransformer that are used here."""

    def __init__(self, body: Any, pooling: str, tokenizer: Any, longest: int, device: str, *, normalises: bool) -> None:
        super().__init__(_Body(body), _Pooling(pooling), *([Normalize()] if normalises else []))
        self.tokenizer, self.max_seq_length, self.device = tokenizer, longest, torch.device(device)
        self._dim = int(body.config.hidden_size)

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self._dim


class _Body(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "token_embeddings": self.model(**features).last_hidden_state}


class _Pooling(torch.nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.pooling_mode = mode

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states, mask = features["token_embeddings"], features["attention_mask"]
        if self.pooling_mode == "cls":
            # Texts may be padded on the left.
            return {"sentence_embedding": states[torch.arange(len(states)), mask.to(torch.int).argmax(dim=1)]}
        shares = mask.unsqueeze(-1).to(states.dtype)
        return {"sentence_embedding": (states * shares).sum(dim=1) / torch.clamp(shares.sum(dim=1), min=1e-9)}


class Normalize(torch.nn.Identity):
    """Says that the folder asks for vectors of unit length; the encoder sees to it."""


def open_usual(folder: Path, pooling: str, device: str) -> UsualModel | None:
    """Return the model of a folder, float32; None where the folder is of another kind.

    `pooling` counts for a folder without modules.json. Raises OSError, ValueError or KeyError where weights or tokenizer cannot be
    read, and ModelError for files that are no JSON.
    """
    config = _object(folder / "config.json")
    if config.get("model_type") not in FAMILIES or "auto_map" in config:
        return None
    normalises, longest = False, 0
    if (folder / MODULES).is_file():
        kinds = _kinds(parse((folder / MODULES).read_bytes()))
        settings = _object(folder / "sentence_bert_config.json")
        longest = settings.pop("max_seq_length", None) or 0
        told = type(longest) is int and longest >= 0 and all(value in _SETTINGS.get(name, ()) for name, value in settings.items())
        if kinds is None or not told:
            return None
        pooling, normalises = _pooling(_object(folder / kinds[1] / "config.json")), len(kinds) == 3
    return _opened(folder, pooling, longest, device, normalises=normalises) if pooling in _POOLINGS else None


def _opened(folder: Path, pooling: str, longest: int, device: str, *, normalises: bool) -> UsualModel:
    with _absent("sklearn", "scipy"):
        from transformers import AutoModel, AutoTokenizer

    body: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    most: int = longest or min(tokenizer.model_max_length, body.config.max_position_embeddings)
    return UsualModel(body.to(device), pooling, tokenizer, most, device, normalises=normalises)


@contextmanager
def _absent(*packages: str) -> Generator[None]:
    """Let imports in this block take packages for ones that are not installed.

    transformers imports scikit-learn, which brings pandas, and SciPy for ways to generate text and to train that no encoder uses.
    """
    hidden = [name for name in packages if name not in sys.modules]
    # Python's own mark of a package that is not there.
    sys.modules.update(dict.fromkeys(hidden, None))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _kinds(modules: Any) -> list[str] | None:
    """Return the folders of transformer, pooling and, if there is one, normalisation; None for other modules."""
    try:
        kinds = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError):
        return None
    usual = [name for name, _ in kinds] in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    return [path for _, path in kinds] if usual and kinds[0][1] == "" else None


def _pooling(settings: dict[str, Any]) -> str:
    """Return the one mode of a pooling, as it is written today or was before."""
    before = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [before.get(name, name) for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    return str(settings.get("pooling_mode") or "+".join(on))


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, ModelError, _AGAIN) if path.is_file() else {}
