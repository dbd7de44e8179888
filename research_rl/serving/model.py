"""Check a Hugging Face model folder before anything is started with it. Reads files; loads no weights, needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.errors import ManifestError, ModelError
from research_rl.pipeline import manifest

__all__ = ["ModelFolder", "check", "served_name"]

_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """A usable model folder: its size on disk, architecture and longest sequence (None when it states none)."""

    path: Path
    architecture: str
    weight_bytes: int
    positions: int | None


def check(folder: Path, context: int) -> ModelFolder:
    """Return what `folder` holds. Raises ModelError when it cannot be served with `context` tokens per sequence."""
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist; build it with `research run policy` or `research run export`, or name another folder"
        )
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"model folder {folder} has no {', '.join(missing)}; give a Hugging Face folder with a fast tokenizer")
    config = _read(folder / "config.json")
    architectures = config.get("architectures")
    if not architectures:
        raise ModelError(f"{folder / 'config.json'} names no architectures; export the model with save_pretrained")
    positions = config.get("max_position_embeddings")
    if positions is not None and positions < context:
        raise ModelError(
            f"{folder} reads {positions} tokens, prompt.max_tokens + episode.max_response_tokens = {context}; "
            "lower one of them or take a model with a longer context"
        )
    return ModelFolder(folder, str(architectures[0]), sum(path.stat().st_size for path in _weights(folder)), positions)


def served_name(folder: Path) -> str:
    """Return the name under which a model is served: it carries the hash of the artifact, so that two cannot be confused."""
    try:
        return f"policy-{manifest.load(folder, verify=False).hash[:12]}"
    except ManifestError:
        return f"policy-{folder.resolve().name}"


def _weights(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read(index)["weight_map"].values())) if index.is_file() else [p.name for p in folder.glob("*.safetensors")]
    if not names:
        raise ModelError(f"model folder {folder} has no *.safetensors; export the model with save_pretrained")
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise ModelError(f"{index} lists {len(names)} shards, {', '.join(lost)} missing; export the model again")
    return [folder / name for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object; export the model again")
    return content
