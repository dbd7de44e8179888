"""The retriever opens only parts that belong together, whole, and that find the canary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research_rl.config import RetrieverConfig
from research_rl.errors import ManifestError, ModelError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.retriever.retriever import Retriever
from tests.knowledge import built, passages
from tests.unit.test_verified import read_bytes, settle

ENCODER = {"dim": 64, "shard_rows": 100}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(folder: Path, **facts: object) -> None:
    """Rewrite facts of a manifest and leave its seal away, as an earlier version wrote it."""
    path = folder / manifest.MANIFEST
    tree = json.loads(path.read_text())
    tree["facts"] |= facts
    del tree["seal"]
    path.write_text(json.dumps(tree))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return built(tmp_path, 120, encoder=ENCODER)


def test_it_finds_passages_with_scores(workspace: Workspace) -> None:
    found = Retriever.open(workspace, RetrieverConfig()).search(["Person7 Surname7", "Person8 Surname8"], 500)
    assert [row[0].contents for row in found] == [passages(9)[7]["contents"], passages(9)[8]["contents"]]
    assert [len(row) for row in found] == [120, 120]
    assert all(a.score >= b.score for a, b in zip(found[0], found[0][1:], strict=False))


@pytest.mark.parametrize(
    "name", ["corpus/passages-00000.arrow", "corpus/id-rows.npy", "embeddings/encoder/idf.npy", "index/index-00000.faiss"]
)
def test_one_flipped_bit_is_refused(workspace: Workspace, name: str) -> None:
    flip(workspace.root / "artifacts" / name)
    with pytest.raises(ManifestError, match=name.split("/")[-1]):
        Retriever.open(workspace, RetrieverConfig())


@pytest.mark.parametrize("stage", ["corpus", "embed", "index"])
def test_a_missing_part_is_named(workspace: Workspace, stage: str) -> None:
    (workspace.folder(stage) / manifest.MANIFEST).unlink()
    with pytest.raises(ManifestError, match="has no manifest"):
        Retriever.open(workspace, RetrieverConfig())


def test_a_part_of_another_build_is_refused(workspace: Workspace) -> None:
    edit(workspace.folder("corpus"), note="changed")
    with pytest.raises(ManifestError, match=r"was built from corpus .* run the stage embed again"):
        Retriever.open(workspace, RetrieverConfig())


def test_a_canary_not_found_is_refused(workspace: Workspace) -> None:
    edit(workspace.folder("index"), canary={"id": "p1", "query": "Person99 Surname99", "row": 1, "top_k": 1})
    with pytest.raises(ManifestError, match="canary passage 'p1'"):
        Retriever.open(workspace, RetrieverConfig())


def test_unverified_opening_still_needs_a_usable_encoder(workspace: Workspace) -> None:
    path = workspace.folder("embed") / "encoder" / "dim"
    path.write_text("x" * (path.stat().st_size - 1) + "\n")
    with pytest.raises(ModelError, match="no lexical encoder"):
        Retriever.open(workspace, RetrieverConfig(verify=False))


def test_a_second_start_reads_no_file_again_and_one_that_changed_since_is_refused(tmp_path: Path) -> None:
    """Every start of every replica hashed corpus and index anew: for an index of Wikipedia's size some minutes each."""
    workspace = built(tmp_path, encoder={"dim": 4096})
    folders = [workspace.folder(stage) for stage in ("corpus", "index")]
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    for folder in folders:
        settle(folder)
    read = list[int]()
    for verify in (False, True, True):
        before = read_bytes()
        Retriever.open(workspace, RetrieverConfig(verify=verify, warm=False))
        read.append(read_bytes() - before)
    bare, first, second = read
    assert first - bare >= size
    assert second - bare < size // 4
    flip(workspace.folder("index") / "index-00000.faiss")
    with pytest.raises(ManifestError, match="index-00000"):
        Retriever.open(workspace, RetrieverConfig())
