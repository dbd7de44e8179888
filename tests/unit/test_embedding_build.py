"""The embed stage resumes by shard, never accepts a torn one, and carries its encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research_rl.embedding import build, load_encoder, vector_shards
from research_rl.embedding.lexical import LexicalEncoder
from research_rl.errors import ManifestError, ModelError
from research_rl.pipeline import manifest
from tests.knowledge import context, passages, store

ENCODER = {"dim": 64, "shard_rows": 100}


def test_vectors_are_those_of_the_carried_encoder(tmp_path: Path) -> None:
    workspace = store(tmp_path)
    build.run(context("embed", tmp_path, encoder=ENCODER))
    folder = workspace.folder("embed")
    found = manifest.load(folder)
    vectors = np.concatenate([np.load(path) for path in vector_shards(folder, found)])
    assert found.counts == {"vectors": 250, "shards": 3, "dim": 64}
    np.testing.assert_array_equal(vectors, load_encoder(folder).encode_passages([row["contents"] for row in passages(250)]))
    assert found.facts["encoder"]["kind"] == "lexical"
    assert not list(workspace.work("").glob("embed-*"))


def test_no_encoder_publishes_canaries_alone_and_is_not_loaded(tmp_path: Path) -> None:
    workspace = store(tmp_path)
    build.run(context("embed", tmp_path, encoder={"kind": "none"}))
    found = manifest.load(workspace.folder("embed"))
    assert (found.counts, found.files) == ({"vectors": 0, "shards": 0, "dim": 0}, ())
    assert len(found.facts["canaries"]) == 8
    with pytest.raises(ManifestError, match=r"encoder.kind=none.*set index.kind=bm25"):
        load_encoder(workspace.folder("embed"))


def test_an_encoder_without_vectors_encodes_queries_as_one_with_them(tmp_path: Path) -> None:
    workspace = store(tmp_path)
    build.run(context("embed", tmp_path, encoder=ENCODER))
    expected = load_encoder(workspace.folder("embed")).encode_queries(["Surname7"])
    build.run(context("embed", tmp_path, encoder={**ENCODER, "vectors": False}))
    found = manifest.load(workspace.folder("embed"))
    assert found.counts == {"vectors": 0, "shards": 0, "dim": 64}
    assert vector_shards(workspace.folder("embed"), found) == []
    np.testing.assert_array_equal(load_encoder(workspace.folder("embed")).encode_queries(["Surname7"]), expected)


def test_a_killed_run_repeats_at_most_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = store(tmp_path)
    encode, seen = LexicalEncoder.encode_passages, list[int]()

    def dying(self: LexicalEncoder, texts: list[str]) -> object:
        seen.append(len(texts))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(LexicalEncoder, "encode_passages", dying)
    with pytest.raises(KeyboardInterrupt):
        build.run(context("embed", tmp_path, encoder=ENCODER))
    assert not workspace.folder("embed").exists()
    build.run(context("embed", tmp_path, encoder=ENCODER))
    assert seen == [100, 100, 50, 50]


@pytest.mark.parametrize("damage", ["flip", "cut", "no record"])
def test_a_torn_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    workspace = store(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("research_rl.pipeline.work.place", full)
    with pytest.raises(OSError, match="No space"):
        build.run(context("embed", tmp_path, encoder=ENCODER))
    assert not workspace.folder("embed").exists()
    shard = next(workspace.work("").glob("embed-*/vectors-00001/vectors-00001.npy"))
    whole = shard.read_bytes()
    if damage == "no record":
        shard.parent.with_suffix(".json").unlink()
    else:
        shard.write_bytes(whole[:-1] + (b"" if damage == "cut" else bytes([whole[-1] ^ 1])))
    monkeypatch.undo()
    build.run(context("embed", tmp_path, encoder=ENCODER))
    assert (workspace.folder("embed") / "vectors-00001.npy").read_bytes() == whole


def test_work_for_other_parameters_is_not_used(tmp_path: Path) -> None:
    workspace = store(tmp_path)
    stale = workspace.work("embed-0123456789abcdef")
    stale.mkdir(parents=True)
    build.run(context("embed", tmp_path, encoder=ENCODER))
    assert not stale.exists()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    hashes: list[str] = []
    for name in ("a", "b"):
        workspace = store(tmp_path / name)
        build.run(context("embed", tmp_path / name, encoder=ENCODER))
        hashes.append(manifest.load(workspace.folder("embed")).hash)
    assert hashes[0] == hashes[1]


def test_a_wrong_model_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    workspace = store(tmp_path)
    (tmp_path / "hollow").mkdir()
    for model, says in [
        (None, "encoder.model is empty"),
        ("/no/such/folder", "is not a folder"),
        (str(tmp_path / "hollow"), "modules.json and config.json are missing"),
    ]:
        with pytest.raises(ModelError, match=says):
            build.run(context("embed", tmp_path, encoder={"kind": "sentence", "model": model}))
    assert not workspace.folder("embed").exists()


def test_the_encoder_of_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds stage corpus"):
        load_encoder(store(tmp_path).folder("corpus"))
