"""Files get a second place on any file system; `artifacts/.work` may lie on another disk than the artifacts."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from research_rl.embedding import build as embed
from research_rl.index import build as index
from research_rl.pipeline import manifest
from research_rl.pipeline.copying import place
from research_rl.training.run import checkpoints
from tests.knowledge import built, context, store

ENCODER = {"dim": 64, "shard_rows": 100}
MEMORY = Path("/dev/shm")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    if not os.access(MEMORY, os.W_OK) or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system only")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_it_is_the_file_behind_a_link_that_gets_the_name(tmp_path: Path) -> None:
    """A link into DVC's cache would lead nowhere once the cache is emptied."""
    cached, link = tmp_path / "cached", tmp_path / "link"
    cached.write_bytes(b"content")
    link.symlink_to(cached)
    place(link, tmp_path / "second")
    assert not (tmp_path / "second").is_symlink() and (tmp_path / "second").stat().st_ino == cached.stat().st_ino


def test_a_file_gets_a_second_name_where_it_can_and_a_copy_elsewhere(tmp_path: Path, elsewhere: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    place(source, tmp_path / "second")
    assert (tmp_path / "second").stat().st_ino == source.stat().st_ino
    place(source, elsewhere / "copy")
    assert [path.name for path in elsewhere.iterdir()] == ["copy"]
    assert (elsewhere / "copy").read_bytes() == b"content"
    with pytest.raises(FileExistsError):
        place(source, tmp_path / "second")


def test_another_error_than_a_missing_link_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    (tmp_path / "source").write_bytes(b"content")
    with pytest.raises(OSError, match="No space"):
        place(tmp_path / "source", tmp_path / "second")


def test_stages_build_with_their_work_on_another_disk(tmp_path: Path, elsewhere: Path) -> None:
    """A hard link cannot lead to another file system: corpus, embed and index ended with "Invalid cross-device link"."""
    here = built(tmp_path / "here", encoder=ENCODER, index={"kind": "hybrid"})
    (tmp_path / "linked/artifacts").mkdir(parents=True)
    (tmp_path / "linked/artifacts/.work").symlink_to(elsewhere)
    workspace = store(tmp_path / "linked")
    embed.run(context("embed", workspace.root, encoder=ENCODER))
    index.run(context("index", workspace.root, encoder=ENCODER, index={"kind": "hybrid"}))
    for stage in ("corpus", "embed", "index"):
        files = [manifest.load(each.folder(stage)).files for each in (here, workspace)]
        assert files[0] == files[1]


def test_a_checkpoint_gets_a_second_place_on_another_disk(tmp_path: Path, elsewhere: Path) -> None:
    folder = tmp_path / "global_step_4"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model.pt").write_bytes(b"weights")
    checkpoints.link(folder, elsewhere / "good")
    assert (elsewhere / "good/actor/model.pt").read_bytes() == b"weights"
