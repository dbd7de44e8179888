"""Find the checkpoints of a verl run that are whole. Knows verl 0.9.1's folder layout and file formats; needs no torch.

A trainer killed while saving leaves a folder that looks like a checkpoint. Here a checkpoint is complete when every
rank's files, the data loader's state and the Hugging Face folder are there and none of them is cut short. The supervisor
seals a complete one: `complete.json`, written last, holds every file's size and sha256, so that later damage shows.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from research_rl.pipeline.copying import place
from research_rl.pipeline.manifest import file_sha256
from research_rl.serving import tensors

__all__ = ["SEAL", "Checkpoint", "complete", "discard_after", "fault", "latest", "link", "prune", "seal"]

SEAL = "complete.json"
"""Written last into a whole checkpoint: `{"files": {name: {"size", "sha256"}}}`."""

_STEP = re.compile(r"global_step_(\d+)")
_PER_RANK = ("model", "optim", "extra_state")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One `global_step_N` folder."""

    step: int
    path: Path

    @property
    def huggingface(self) -> Path:
        """The policy in Hugging Face format."""
        return self.path / "actor" / "huggingface"


def complete(folder: Path) -> list[Checkpoint]:
    """Return the whole checkpoints below `folder`, oldest first."""
    return [checkpoint for checkpoint in _all(folder) if fault(checkpoint.path) is None]


def silent(checkpoint: Checkpoint, why: str) -> None:
    """For callers that need not hear of checkpoints passed over."""


def latest(
    folder: Path, at_most: int | None = None, *, verify: bool = False, passed_over: Callable[[Checkpoint, str], None] = silent
) -> Checkpoint | None:
    """Return the newest whole checkpoint, of step `at_most` or before; `passed_over` is called with each newer one and why.

    With `verify` every byte is read: against the seal where there is one, else against the archives' own checksums.
    """
    for checkpoint in reversed(_all(folder)):
        if at_most is not None and checkpoint.step > at_most:
            continue
        why = fault(checkpoint.path, verify=verify)
        if why is None:
            return checkpoint
        passed_over(checkpoint, why)
    return None


def seal(path: Path) -> None:
    """Write the seal of a whole checkpoint, in one step; a sealed one is left as it is."""
    if (path / SEAL).is_file():
        return
    files = {
        file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    temporary = path.with_name(f".{path.name}.{SEAL}.tmp")  # beside it: the folder's files may be given second names meanwhile
    temporary.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path / SEAL)


def fault(path: Path, *, verify: bool = False) -> str | None:
    """Return what is missing, cut or (with `verify`) altered in a `global_step_N` folder, None when it is whole."""
    return _broken_seal(path, verify) if (path / SEAL).is_file() else _broken_structure(path, verify)


def _broken_seal(path: Path, verify: bool) -> str | None:
    files = _sealed(path / SEAL)
    if files is None:
        return f"{SEAL} cannot be read"
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            return f"{name} is missing or cut"
        if verify and file_sha256(file) != entry["sha256"]:
            return f"{name} was altered after it was saved"
    return None


def _sealed(path: Path) -> dict[str, dict[str, Any]] | None:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        whole = bool(files) and all({"size", "sha256"} <= entry.keys() for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return cast(dict[str, dict[str, Any]], files) if whole else None


def _broken_structure(path: Path, verify: bool) -> str | None:
    world_size = _world_size(path / "actor" / "fsdp_config.json")
    if world_size is None:
        return "actor/fsdp_config.json is missing or cut"
    names = [f"actor/{part}_world_size_{world_size}_rank_{rank}.pt" for part in _PER_RANK for rank in range(world_size)]
    for name in (*names, "data.pt"):
        if not _is_whole_archive(path / name, verify):
            return f"{name} is missing or cut"
    huggingface = path / "actor" / "huggingface"
    if not (huggingface / "config.json").is_file():
        return "actor/huggingface/config.json is missing"
    weights = sorted(huggingface.glob("*.safetensors"))
    return next((why for why in map(tensors.fault, weights) if why), None) if weights else "actor/huggingface has no *.safetensors"


def prune(folder: Path, keep: int, judged: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints, and older folders that are not whole.

    Checkpoints of steps after `judged` are left out of account: a rule of the watch may yet call for the one before them.
    """
    newest = [each for each in complete(folder) if judged is None or each.step <= judged][-keep:]
    for checkpoint in _all(folder):
        # A newer folder that is not whole is the one that verl is writing.
        if checkpoint not in newest and checkpoint.step < (newest[-1].step if newest else 0):
            shutil.rmtree(checkpoint.path)


def link(source: Path, target: Path, include: Callable[[Path], bool] = lambda path: True) -> None:
    """Give a finished file, or the wanted ones of a folder's files, a second place: nothing writes to them again."""
    if source.is_file():
        place(source, target)
        return
    for path in sorted(path for path in source.rglob("*") if path.is_file() and include(path)):
        other = target / path.relative_to(source)
        other.parent.mkdir(parents=True, exist_ok=True)
        place(path, other)


def discard_after(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps, whole or not: these steps are about to be done again."""
    for checkpoint in _all(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)


def _all(folder: Path) -> list[Checkpoint]:
    matches = [(match, path) for path in folder.glob("global_step_*") if (match := _STEP.fullmatch(path.name))]
    return sorted(Checkpoint(int(match[1]), path) for match, path in matches)


def _world_size(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["world_size"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _is_whole_archive(path: Path, verify: bool) -> bool:
    """torch.save writes a zip file, whose directory stands at its end; with `verify` its checksums are compared.

    A process told to end in the middle of torch.save still writes that directory, over what there is by then: the archive is
    a sound zip file without its pickle or without some of the tensors the pickle names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            pickled = next((name for name in names if name.endswith("/data.pkl")), None)
            if pickled is None:
                return False
            folder = pickled.removesuffix("data.pkl")
            whole = all(f"{folder}data/{key}" in names for key in _tensors(archive.read(pickled)))
            return whole and (not verify or archive.testzip() is None)
    except (FileNotFoundError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError):
        return False  # a damaged directory may also claim encryption or an unknown compression


def _tensors(pickled: bytes) -> set[str]:
    """Return the keys of the storages that a pickle of torch.save refers to."""
    reader = _References(io.BytesIO(pickled))
    reader.load()
    return reader.keys


class _References(pickle.Unpickler):
    """Follows a pickle without making anything of it: every class it names is a `_Blank`, and only references are kept."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.keys = set[str]()

    def find_class(self, module: str, name: str) -> Any:
        return _Blank

    def persistent_load(self, pid: Any) -> Any:
        self.keys.add(str(pid[2]))  # ("storage", type, key, device, elements)
        return _Blank()


class _Blank:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Blank:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __call__(self, *arguments: Any, **named: Any) -> _Blank:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...
