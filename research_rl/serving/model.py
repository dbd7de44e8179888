"""Check a Hugging Face model folder before anything is published, started or trained with it. Reads files and headers; needs no torch.

One rule for every stage: a configuration that names an architecture, a fast tokenizer whose tokens fit the model's rows, and all
weights, in safetensors files that are whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from research_rl.episode.prompts import FolderTokenizer
from research_rl.errors import ModelError
from research_rl.pipeline import manifest
from research_rl.pipeline.json_files import read_object
from research_rl.serving.tensors import LFS_POINTER, Tensor, tensors, weight_bytes

__all__ = ["ModelFolder", "check", "inspect", "served_name", "stated_rows"]

_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
"""The number of a layer in a tensor's name, as transformers' decoder models write it."""
_HEAD = re.compile(r"lm_head|embed_out|output")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
"""The table of a decoder's input embeddings, a row a token."""


_AGAIN = "download or export the model again"


class _Described(BaseModel):
    """What config.json says, as far as it is used here; a model of text and images describes its language model in a part of its own."""

    architectures: list[str] | None = None
    num_hidden_layers: int | None = Field(default=None, ge=0, le=100_000)
    vocab_size: int | None = Field(default=None, ge=0)
    max_position_embeddings: int | None = Field(default=None, ge=1)
    tie_word_embeddings: bool | None = None
    text_config: _Described | None = None

    @property
    def language(self) -> _Described:
        return self.text_config or self


@dataclass(frozen=True)
class ModelFolder:
    """A usable model folder: architecture, size of its weights in bytes, longest sequence (None when it states none), tokens.

    `vocabulary` counts the tokenizer's tokens, `rows` those that the model can read, which may be more; None where nothing tells.
    """

    path: Path
    architecture: str
    weight_bytes: int
    positions: int | None
    vocabulary: int = 0
    pad_token: str | None = None
    rows: int | None = None


def inspect(folder: Path) -> ModelFolder:
    """Return what `folder` holds. Raises ModelError naming what is missing, cut or does not fit."""
    _require_files(folder)
    config = _described(folder / "config.json")
    if not config.architectures:
        raise ModelError(f"{folder / 'config.json'} names no architectures; export the model with save_pretrained")
    size, present = weight_bytes(folder), tensors(folder)
    _require_weights(folder, config, present)
    tokenizer = FolderTokenizer(folder)
    said = config.language
    rows = _embedding_rows(present) if said.vocab_size is None else said.vocab_size
    # Fewer tokens are usual: models pad their rows to a multiple that suits the hardware.
    if rows is not None and len(tokenizer) > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows; they belong to different models"
        )
    known = (config.architectures[0], size, said.max_position_embeddings)
    return ModelFolder(folder, *known, len(tokenizer), tokenizer.pad_token, rows)


def check(folder: Path, context: int, reserved: int = 0) -> ModelFolder:
    """Return what `folder` holds. Raises ModelError when it cannot be served with `context` tokens per sequence.

    `reserved` is how many tokens more the server needs for itself.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist; build it with `research run policy` or `research run export`, or name another folder"
        )
    model = inspect(folder)
    if model.positions is not None and model.positions < context + reserved:
        reserve = f" and the server keeps {reserved} for itself" if reserved else ""
        raise ModelError(
            f"{folder} reads {model.positions} tokens, prompt.max_tokens + episode.max_response_tokens = {context}{reserve}; "
            "lower one of them or take a model with a longer context"
        )
    return model


def served_name(folder: Path) -> str:
    """Return the name under which a model is served: it carries the hash of the artifact, so that two cannot be confused."""
    artifact = manifest.found(folder, verify=False)
    # A folder of the user's own has no manifest.
    return f"policy-{artifact.hash[:12] if artifact else folder.resolve().name}"


def stated_rows(folder: Path) -> int | None:
    """Return how many tokens the model of a folder can read; None where neither its config.json nor its weights say it.

    The folder may hold nothing else, as that of a tokenizer alone. Raises ModelError for a config.json or weights that cannot be read.
    """
    path = folder / "config.json"
    stated = _described(path).language.vocab_size if path.is_file() else None
    return _embedding_rows(tensors(folder)) if stated is None and any(folder.glob("*.safetensors")) else stated


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give a Hugging Face model folder")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"model folder {folder} has no {', '.join(missing)}; give a Hugging Face folder with a fast tokenizer")
    for name in _NEEDED:
        with (folder / name).open("rb") as stream:
            # A clone without `git lfs` holds these: small text files under the right names.
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{folder / name} is a Git LFS pointer and not the file itself; run `git lfs pull` in {folder}")


def _require_weights(folder: Path, config: _Described, present: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless the tensors that index and configuration name are in the files."""
    index = folder / "model.safetensors.index.json"
    listed: dict[str, str] = read_object(index, ModelError, _AGAIN)["weight_map"] if index.is_file() else {}
    lost = sorted(name for name, file in listed.items() if name not in present or present[name].file.name != file)
    if lost:
        raise ModelError(
            f"{index} lists {len(listed)} tensors, {len(lost)} are not where it says, {lost[0]!r} first; download the model again"
        )
    # Without an index nothing lists the tensors; a lost shard shows as layers that have none.
    numbers = {int(match[1]) for name in present if (match := _LAYER.search(name))}
    layers = config.language.num_hidden_layers or 0
    if numbers and (absent := sorted(set(range(layers)) - numbers)):
        raise ModelError(
            f"{folder} has weights for {layers - len(absent)} of {layers} layers, layer {absent[0]} has none; download the model again"
        )
    # Only where it is said: what a missing entry means differs between architectures.
    if config.tie_word_embeddings is False and numbers and not any(_HEAD.search(name) for name in present):
        raise ModelError(f"{folder} has no output weights (lm_head) and its config.json ties none; download the model again")


def _embedding_rows(present: Mapping[str, Tensor]) -> int | None:
    """Return the rows of the input embeddings; config.json may leave their number to its architecture's default, as Gemma 3's do."""
    return max((tensor.shape[0] for name, tensor in present.items() if _EMBEDDING.search(name) and tensor.shape), default=None)


def _described(path: Path) -> _Described:
    try:
        return _Described.model_validate(read_object(path, ModelError, _AGAIN))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path}: {name}={str(first['input'])[:80]!r}: {first['msg']}; {_AGAIN}") from None
