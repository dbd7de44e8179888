"""A torn, altered or unfinished artifact never reads as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_rl.errors import ManifestError
from research_rl.pipeline import manifest


def _publish(target: Path, text: str = "content", **facts: object) -> manifest.Manifest:
    with manifest.publish(target, "index", "c0", {}) as staging:
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "a.txt").write_text(text)
        (staging.path / "b.bin").write_bytes(bytes(range(256)))
        staging.counts["rows"] = 2
        staging.facts.update(facts)
    return manifest.load(target)


def test_published_folder_reads_back_with_its_facts(tmp_path: Path) -> None:
    found = _publish(tmp_path / "index", dim=3)
    assert (found.stage, found.counts, found.facts) == ("index", {"rows": 2}, {"dim": 3})
    assert [entry.path for entry in found.files] == ["b.bin", "sub/a.txt"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    assert _publish(tmp_path / "one").to_bytes() == _publish(tmp_path / "two").to_bytes()
    assert _publish(tmp_path / "one").hash != _publish(tmp_path / "two", "other").hash


def test_an_error_leaves_the_old_artifact_and_no_trace(tmp_path: Path) -> None:
    before = _publish(tmp_path / "index")

    def half() -> None:
        with manifest.publish(tmp_path / "index", "index", "c1", {}) as staging:
            (staging.path / "half").write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        half()
    assert manifest.load(tmp_path / "index") == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_new_publication_replaces_the_old_one_whole(tmp_path: Path) -> None:
    _publish(tmp_path / "index")
    with manifest.publish(tmp_path / "index", "index", "c1", {}) as staging:
        (staging.path / "only").write_text("x")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["manifest.json", "only"]


@pytest.mark.parametrize("name", ["b.bin", "sub/a.txt"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    _publish(tmp_path / "index")
    path = tmp_path / "index" / name
    original = path.read_bytes()
    for position in range(len(original)):
        path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        with pytest.raises(ManifestError, match="sha256"):
            manifest.load(tmp_path / "index")


@pytest.mark.parametrize("name", ["b.bin", "sub/a.txt"])
def test_a_missing_or_shortened_file_is_named_even_without_hashing(tmp_path: Path, name: str) -> None:
    _publish(tmp_path / "index")
    path = tmp_path / "index" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="bytes, its manifest says"):
        manifest.load(tmp_path / "index", verify=False)
    path.unlink()
    with pytest.raises(ManifestError, match="is missing though"):
        manifest.load(tmp_path / "index", verify=False)


def test_a_cut_manifest_is_refused(tmp_path: Path) -> None:
    _publish(tmp_path / "index")
    path = tmp_path / "index" / manifest.MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match="is not a manifest"):
        manifest.load(tmp_path / "index")


def test_a_folder_without_manifest_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        manifest.load(tmp_path)


def test_sweep_removes_leftovers_and_finishes_a_cut_swap(tmp_path: Path) -> None:
    before = _publish(tmp_path / "index")
    (tmp_path / ".index.abc.tmp").mkdir()
    (tmp_path / "index").rename(tmp_path / ".index.def.old")
    manifest.sweep(tmp_path / "index")
    assert manifest.load(tmp_path / "index") == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
