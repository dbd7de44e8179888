"""A new snapshot of the corpus costs what changed in it, and gives what a build from nothing gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research_rl.config import RetrieverConfig
from research_rl.embedding import Encoded, build, vector_shards
from research_rl.embedding.sentence import SentenceEncoder
from research_rl.embedding.standing import StandingVectors, keys_of
from research_rl.index import build as index
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, measured
from research_rl.retriever.retriever import Retriever
from tests.encoder_model import texts, write_model
from tests.knowledge import context, snapshot

ROWS = 600
Passages = list[dict[str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "whole")


def rows() -> Passages:
    return [{"id": f"p{n}", "contents": f"x{n} {text}"} for n, text in enumerate(texts(ROWS))]


def changed(before: Passages) -> Passages:
    """Two passages changed, three removed, four added at the end; the first two hundred rows stay."""
    after = [dict(row) for row in before]
    after[250]["contents"] += " queen"
    after[599]["contents"] = "the ship of the king"
    for place in (555, 412, 300):
        del after[place]
    return after + [{"id": f"new{n}", "contents": f"x{n} the painter of river {n}"} for n in range(4)]


def refresh(root: Path, snapshot_of: Passages, tree: dict[str, Any]) -> Workspace:
    """Build corpus, embeddings and index over what stands."""
    workspace = snapshot(root, snapshot_of)
    build.run(context("embed", root, **tree))
    index.run(context("index", root, **tree))
    return workspace


def tree_of(model: Path, **index: Any) -> dict[str, Any]:
    return {
        "encoder": {"kind": "sentence", "model": str(model), "shard_rows": 100, "dtype": "float32"},
        "index": {"factory": "Exact", **index},
    }


def note(workspace: Workspace, stage: str = "embed") -> dict[str, Any]:
    return measured(workspace, manifest.load(workspace.folder(stage), verify=False))


def counted(workspace: Workspace) -> dict[str, int]:
    return {name: note(workspace)[name] for name in ("added", "changed", "removed", "reused", "encoded")}


def hashes(workspace: Workspace) -> list[str]:
    return [manifest.load(workspace.folder(stage)).hash for stage in ("corpus", "embed", "index")]


def inodes(workspace: Workspace, stage: str) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in workspace.folder(stage).iterdir()}


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which every text is added that the encoder is given."""
    given, encode = list[str](), SentenceEncoder.encode

    def seen(self: SentenceEncoder, some: list[str], progress: Any = None) -> Encoded:
        given.extend(some)
        return encode(self, some, progress)

    monkeypatch.setattr(SentenceEncoder, "encode", seen)
    return given


def replies(workspace: Workspace, queries: list[str]) -> list[list[tuple[str, str, float]]]:
    retriever = Retriever.open(workspace, RetrieverConfig(warm=False))
    return [[(hit.id, hit.contents, hit.score) for hit in found] for found in retriever.search(queries, 10)]


@pytest.mark.parametrize("kind", [{"factory": "Exact"}, {"factory": "Flat"}, {"factory": "RR32,RaBitQ"}, {"kind": "hybrid"}])
def test_a_refresh_encodes_what_is_new_and_gives_what_a_build_from_nothing_gives(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, str]
) -> None:
    before, tree = rows(), tree_of(model, shard_rows=100, **kind)
    after = changed(before)
    workspace = refresh(tmp_path / "kept", before, tree)
    assert counted(workspace) == {"added": ROWS, "changed": 0, "removed": 0, "reused": 0, "encoded": ROWS}
    given = watch(monkeypatch)
    refresh(tmp_path / "kept", after, tree)
    assert sorted(given) == sorted(row["contents"] for row in after if row not in before)
    assert counted(workspace) == {"added": 4, "changed": 2, "removed": 3, "reused": ROWS - 5, "encoded": 6}
    fresh = refresh(tmp_path / "fresh", after, tree)
    # Every vector, every code, every score: the artifacts are the same, byte for byte.
    assert hashes(workspace) == hashes(fresh)
    queries = [row["contents"] for row in (*before[::7], *after[250:260])]
    mine = replies(workspace, queries)
    assert mine == replies(fresh, queries)
    gone = {row["id"] for row in before} - {row["id"] for row in after}
    assert len(gone) == 3 and not gone & {hit[0] for found in mine for hit in found}


@pytest.mark.parametrize(("factory", "name"), [("Exact", "scan-{:05d}.bf16"), ("Flat", "index-{:05d}.faiss")])
def test_files_that_hold_nothing_that_changed_are_kept(tmp_path: Path, model: Path, factory: str, name: str) -> None:
    before, tree = rows(), tree_of(model, shard_rows=100, factory=factory)
    workspace = refresh(tmp_path, before, tree)
    first = {stage: inodes(workspace, stage) for stage in ("embed", "index")}
    refresh(tmp_path, changed(before), tree)
    then = {stage: inodes(workspace, stage) for stage in ("embed", "index")}
    for stage, file in (("embed", "vectors-{:05d}.npy"), ("index", name)):
        # The rows before the first change.
        assert [number for number in range(6) if first[stage][file.format(number)] == then[stage][file.format(number)]] == [0, 1]


def test_the_same_passages_in_another_order_are_not_encoded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = refresh(tmp_path / "kept", rows(), tree_of(model))
    given = watch(monkeypatch)
    refresh(tmp_path / "kept", rows()[::-1], tree_of(model))
    assert given == [] and counted(workspace) == {"added": 0, "changed": 0, "removed": 0, "reused": ROWS, "encoded": 0}
    assert hashes(workspace) == hashes(refresh(tmp_path / "fresh", rows()[::-1], tree_of(model)))


def test_another_encoder_and_a_torn_artifact_spare_nothing(tmp_path: Path, model: Path) -> None:
    before, tree = rows()[:200], tree_of(model)
    workspace = refresh(tmp_path, before, tree)
    prefixed = {**tree, "encoder": {**tree["encoder"], "passage_prefix": "passage : "}}
    refresh(tmp_path, before, prefixed)
    assert (note(workspace)["reused"], note(workspace)["changed"]) == (0, 0)
    path = workspace.folder("embed") / "vectors-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refresh(tmp_path, before, prefixed)
    assert note(workspace)["reused"] == 0
    manifest.load(workspace.folder("embed"))


def test_force_encodes_all_anew(tmp_path: Path, model: Path) -> None:
    workspace = refresh(tmp_path, rows()[:200], tree_of(model))
    given = context("embed", tmp_path, **tree_of(model))
    build.run(type(given)(given.stage, given.config, given.workspace, given.parents, given.progress, force=True))
    assert note(workspace)["reused"] == 0


def test_a_lexical_encoder_weighs_words_by_the_whole_corpus_and_encodes_all_anew(tmp_path: Path) -> None:
    tree = {"encoder": {"dim": 64, "shard_rows": 100}}
    before = rows()
    workspace = refresh(tmp_path / "kept", before, tree)
    refresh(tmp_path / "kept", changed(before), tree)
    assert counted(workspace) == {"added": 4, "changed": 2, "removed": 3, "reused": 0, "encoded": ROWS + 1}
    fresh = refresh(tmp_path / "fresh", changed(before), tree)
    assert hashes(workspace) == hashes(fresh)


def test_texts_that_share_half_a_hash_are_told_apart() -> None:
    keys = keys_of(["a", "b"], ["one", "two"])
    other = keys.copy()
    other[1, 2] ^= np.uint64(1)
    assert StandingVectors(keys).plan(other, 0).changes == {"added": 0, "changed": 1, "matched": 2, "reused": 0, "encoded": 2}


def test_an_artifact_without_keys_is_encoded_once_more(tmp_path: Path, model: Path) -> None:
    tree = tree_of(model)
    workspace = refresh(tmp_path, rows()[:200], tree)
    folder = workspace.folder("embed")
    found = manifest.load(folder)
    kept = {path.name: path.read_bytes() for path in vector_shards(folder, found)}
    encoder = {entry.path: (folder / entry.path).read_bytes() for entry in found.files if entry.path.startswith("encoder/")}
    with manifest.publish(folder, "embed", found.config_hash, {"corpus": manifest.load(workspace.folder("corpus"))}) as staging:
        for name, content in {**kept, **encoder}.items():
            (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.path / name).write_bytes(content)
        staging.counts |= found.counts
        staging.facts |= found.facts
    refresh(tmp_path, rows()[:200], tree)
    assert note(workspace)["encoded"] == 200
