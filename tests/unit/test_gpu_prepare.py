"""What a GPU machine must be brought travels in parts that are whole or refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import pack, prepare
from research_rl.paths import CHECKOUT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(random.Random(0).randbytes(20_000))
    (folder / "deep" / "config.json").write_text("{}")
    (folder / "deep" / "skipped.pyc").write_text("x")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_come_back_as_they_were(source: Path, tmp_path: Path) -> None:
    listing = pack.pack(source, tmp_path / "parts", 1000, "a", ["*.pyc"])
    assert len(listing["parts"]) > 1 and all(entry["bytes"] <= 1000 for entry in listing["parts"])
    subprocess.run([sys.executable, "-I", CHECKOUT / "benchmarks/gpu/pack.py", tmp_path / "parts", tmp_path / "back"], check=True)
    wanted = content(source)
    del wanted["deep/skipped.pyc"]
    assert content(tmp_path / "back") == wanted


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped"])
def test_a_torn_part_is_named_and_nothing_is_unpacked(source: Path, tmp_path: Path, harm: str) -> None:
    pack.pack(source, tmp_path / "parts", 1000, "a")
    part = tmp_path / "parts" / "part.001"
    whole = part.read_bytes()
    if harm == "gone":
        part.unlink()
    else:
        part.write_bytes(whole[:-1] if harm == "cut" else bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=r"part\.001; bring them again"):
        pack.unpack(tmp_path / "parts", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert pack.packed(tmp_path / "parts", "a") is None


def test_a_payload_that_stands_is_left_and_another_origin_is_packed_anew(source: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--check", "serving", "--model", str(source), "--wheels", str(tmp_path / "none.txt")]
    (tmp_path / "none.txt").write_text("iniconfig==2.3.0\n")
    options = prepare.Options(tmp_path / "out", ["serving"], tmp_path / "none.txt", source, None, 1000)
    pack.pack(source, tmp_path / "out" / "site", 1000, prepare.origin_of("site", options))
    first = prepare.prepare(options)
    assert first["model"]["for"] == ["serving"] and json.loads((tmp_path / "out/payloads.json").read_text()) == first
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("part.*")}
    assert prepare.prepare(options) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("part.*")} == times
    (source / "weights").write_bytes(b"other")
    assert prepare.prepare(options)["model"] != first["model"]
    with pytest.raises(SystemExit):
        prepare.main([*arguments[:4], "grpo", *arguments[4:]])
