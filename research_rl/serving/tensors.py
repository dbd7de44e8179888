"""Tensors of safetensors files, read in place and written one after the other. Knows the format; knows no model, needs no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.errors import ModelError
from research_rl.pipeline.json_files import parse, read_object

__all__ = [
    "LFS_POINTER",
    "Bytes",
    "Output",
    "Tensor",
    "blocks",
    "content",
    "fault",
    "floats",
    "read",
    "tensors",
    "to_bfloat16",
    "weight_bytes",
    "weight_files",
    "write",
]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_BLOCK = 1 << 24
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in the place of a large one."""


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


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model: those its index lists, else all of the folder.

    Other formats are not read: pickled weights (*.bin) can run code, and no server here loads them. Raises ModelError when none or not
    all of them are there.
    """
    names = _weight_names(folder)
    if not names:
        raise ModelError(f"{folder} has no *.safetensors; save the model with save_pretrained, or download it in this format")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files, {missing[0]} first; download the model completely")
    return [folder / name for name in names]


def weight_bytes(folder: Path) -> int:
    """Return the size on disk of those weight files that are there."""
    return sum(path.stat().st_size for name in _weight_names(folder) if (path := folder / name).is_file())


def _weight_names(folder: Path) -> list[str]:
    """Return the names that the index lists, else those that are there and those that their numbering (-00001-of-00003) implies."""
    index = folder / _INDEX
    if index.is_file():
        return _indexed(index)
    names = {path.name for path in folder.glob("*.safetensors")}
    for match in filter(None, map(_SHARD.fullmatch, sorted(names))):
        names |= {f"{match[1]}{number:05d}{match[2]}" for number in range(1, 1 + int(match[3]))}
    return sorted(names)


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(read_object(index, ModelError, _AGAIN)["weight_map"].values()))
        if any(Path(name).name != name or "\0" in name for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is no index of weight files in this folder; {_AGAIN}") from None
    return names


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder by name. Raises ModelError when a file is missing, cut or in another format."""
    return {tensor.name: tensor for path in weight_files(folder) for tensor in read(path)}


def read(path: Path) -> Iterator[Tensor]:
    """Yield the tensors of one file. Raises ModelError when it cannot be whole."""
    if reason := fault(path):
        raise ModelError(f"{path.parent} cannot be used: {reason}; download or save the model again")
    length, header = _header(path)
    for name, entry in header.items():
        if name != "__metadata__":
            # Offsets count from behind the 8 bytes of the header's length and the header.
            start, end = entry["data_offsets"]
            yield Tensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + start, 8 + length + end)


def fault(path: Path) -> str | None:
    """Return why a safetensors file cannot be whole, by its header and its size; None when it can."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"{path.name} is a Git LFS pointer and not the file itself (run `git lfs pull`)"
    try:
        length, header = _header(path)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except _Cut:
        return f"{path.name} is cut in its header"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{path.name} has no readable header"
    return None if size == 8 + length + end else f"{path.name} has {size} bytes, its header says {8 + length + end}"


_AGAIN = "download the model again"
_LONGEST_HEADER = 100_000_000
"""The limit of the format's own library."""


class _Cut(Exception):
    """The file ends within its header."""


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of the header in bytes and the header."""
    with path.open("rb") as stream:
        start = stream.read(8)
        # Shorter than 8 bytes: any length that the next line refuses.
        length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else path.stat().st_size
        # Before reading: a damaged length could ask for more than the memory.
        if length > path.stat().st_size - 8:
            raise _Cut
        if length > _LONGEST_HEADER:
            raise ValueError
        return length, _checked(parse(stream.read(length)))


def _checked(header: Any) -> dict[str, Any]:
    """Return a header whose every tensor has a format, a shape and a place. Raises ValueError."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        numbers = [start, end, *entry["shape"]]
        if not (isinstance(entry["dtype"], str) and all(type(number) is int and number >= 0 for number in numbers) and start <= end):
            raise ValueError
    return header


def write(path: Path, outputs: Sequence[Output]) -> None:
    """Write a file, one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in outputs:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format allows spaces behind the header; with them the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in outputs:
            stream.writelines(tensor.content())


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
    # bfloat16 is the upper half of a float32.
    values = raw.view("<f4") if tensor.dtype == "F32" else (raw.view("<u2").astype("<u4") << 16).view("<f4")
    return values.reshape(tensor.shape)


def to_bfloat16(block: Bytes) -> bytes:
    """Round float32 bytes to the nearest bfloat16, ties to even, as torch does; a NaN stays a NaN."""
    # 64 bits, because the rounding below can carry out of 32.
    bits = block.view(np.dtype("<u4")).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).astype("<u2").tobytes()
