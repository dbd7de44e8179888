"""Tensors of safetensors files, read in place and written one after the other. Knows the format; knows no model, needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.errors import ModelError

__all__ = ["Bytes", "Output", "Tensor", "blocks", "content", "floats", "read", "tensors", "to_bfloat16", "write"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: its place in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class Output:
    """A tensor to be written; `content` yields its bytes, piece by piece, when its turn has come."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    content: Callable[[], Iterator[bytes]]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all safetensors files of a folder by name. Raises ModelError when there is none."""
    found = {tensor.name: tensor for path in sorted(folder.glob("*.safetensors")) for tensor in read(path)}
    if not found:
        raise ModelError(f"{folder} has no *.safetensors; a Hugging Face model folder is needed")
    return found


def read(path: Path) -> Iterator[Tensor]:
    """Yield the tensors of one file."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield Tensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + start, 8 + length + end)


def write(path: Path, outputs: Sequence[Output]) -> None:
    """Write a file, one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in outputs:
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [offset, offset + item.size]}
        offset += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for item in outputs:
            stream.writelines(item.content())


def content(tensor: Tensor) -> Bytes:
    """Return a tensor's bytes, mapped."""
    return np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.end - tensor.start,))


def blocks(values: Bytes) -> Iterator[Bytes]:
    """Yield copies of pieces of 16 MiB."""
    for start in range(0, len(values), _BLOCK):
        # A copy is aligned for the view; the file's bytes need not be.
        yield np.array(values[start : start + _BLOCK])


def floats(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a float32 or bfloat16 tensor's values in its shape, as float32. Raises ModelError for another format."""
    if tensor.dtype not in ("F32", "BF16"):
        raise ModelError(f"{tensor.name} in {tensor.file} has format {tensor.dtype}; F32 or BF16 is needed")
    raw = np.array(content(tensor))
    values = raw.view("<f4") if tensor.dtype == "F32" else (raw.view("<u2").astype("<u4") << 16).view("<f4")
    return values.reshape(tensor.shape)


def to_bfloat16(block: Bytes) -> bytes:
    """Round float32 bytes to the nearest bfloat16, ties to even, as torch does; a NaN stays a NaN."""
    bits = block.view(np.dtype("<u4")).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).astype("<u2").tobytes()
