"""The store returns every passage by row and by id, from mapped shards, with equal bytes for equal input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research_rl.config import Config
from research_rl.corpus import build
from research_rl.corpus.store import PassageStore
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError, ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Progress, Workspace, silent

ROWS = 257


def passage(n: int) -> Passage:
    return Passage(f"p-{n}", f'"Title {n}"\nÜber {n} ' + "x" * (n % 7))


def prepared(root: Path, rows: int = ROWS, progress: Progress = silent) -> Context:
    """Publish a corpus file and return the context that builds its store in shards of 100."""
    workspace = Workspace(root)
    for stage in ("download", "validate"):
        with manifest.publish(workspace.folder(stage), stage, "x", {}) as staging:
            staging.counts["corpus"] = rows
            lines = [json.dumps({"id": passage(n).id, "contents": passage(n).contents}) for n in range(rows)]
            (staging.path / "corpus.jsonl").write_text("\n".join(lines))
    parents = {name: manifest.load(workspace.folder(name)) for name in ("download", "validate")}
    return Context(STAGES["corpus"], Config.model_validate({"corpus": {"shard_rows": 100}}), workspace, parents, progress)


def made(root: Path) -> Path:
    build.run(prepared(root))
    return Workspace(root).folder("corpus")


def test_a_killed_build_redoes_one_shard_at_most(tmp_path: Path) -> None:
    def killed(text: str, share: float) -> None:
        if text.startswith("200 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.run(prepared(tmp_path, progress=killed))
    assert not (tmp_path / "artifacts/corpus").exists()
    (work,) = (tmp_path / "artifacts/.work").iterdir()
    first, second = (work / f"passages-0000{n}.arrow" / f"passages-0000{n}.arrow" for n in range(2))
    inode = first.stat().st_ino
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    told: list[str] = []
    build.run(prepared(tmp_path, progress=lambda text, _: told.append(text)))
    store = PassageStore(tmp_path / "artifacts/corpus")
    assert store.get(range(ROWS)) == [passage(n) for n in range(ROWS)], "the altered shard was built anew"
    assert (tmp_path / "artifacts/corpus/passages-00000.arrow").stat().st_ino == inode, "the finished one was kept"
    assert [row.split(",")[0] for row in told] == ["100 of 257 passages", "200 of 257 passages", "257 of 257 passages"]
    assert list((tmp_path / "artifacts/.work").glob("corpus*")) == []
    (tmp_path / "b").mkdir()
    assert manifest.load(made(tmp_path / "b")).hash == manifest.load(tmp_path / "artifacts/corpus").hash


@pytest.mark.parametrize("line", ["{oops", '{"id": "p-3"}', "", '{"id": 3, "contents": "x"}'])
def test_a_line_that_no_download_wrote_is_refused(tmp_path: Path, line: str) -> None:
    made = prepared(tmp_path, rows=10)
    path = tmp_path / "data/corpus.jsonl"
    path.write_text(path.read_text().replace(json.dumps({"id": "p-3", "contents": passage(3).contents}, ensure_ascii=True), line))
    with pytest.raises(DataError, match=r"corpus.jsonl: lines 1 to 10 are not as the download stage writes them"):
        build.run(made)


def test_every_passage_is_found_by_row_and_by_id(tmp_path: Path) -> None:
    store = PassageStore(made(tmp_path))
    assert (len(store), store.shards) == (ROWS, 3)
    assert store.get(range(ROWS)) == [passage(n) for n in range(ROWS)]
    assert [store.row_of(f"p-{n}") for n in range(ROWS)] == list(range(ROWS))
    assert store.row_of("p-999") is None


def test_batches_cross_shards_in_order(tmp_path: Path) -> None:
    store = PassageStore(made(tmp_path))
    found = list(store.batches(60))
    assert [start for start, _ in found] == [0, 60, 120, 180, 240]
    assert [text for _, texts in found for text in texts] == [passage(n).contents for n in range(ROWS)]
    assert store.texts(95, 105) == [passage(n).contents for n in range(95, 105)]


def test_unknown_rows_are_named(tmp_path: Path) -> None:
    store = PassageStore(made(tmp_path))
    with pytest.raises(IndexError, match="row 257 is outside the 257"):
        store.get([257])
    with pytest.raises(IndexError, match="row -1"):
        store.get([-1])


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    assert manifest.load(first).hash == manifest.load(second).hash
    assert all((second / entry.path).read_bytes() == (first / entry.path).read_bytes() for entry in manifest.load(first).files)


def test_another_stages_folder_and_a_torn_shard_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path)
    with pytest.raises(ManifestError, match="holds stage download"):
        PassageStore(tmp_path / "data")
    shard = folder / "passages-00001.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    store = PassageStore(folder)
    assert store.get([0]) == [passage(0)]
    with pytest.raises(ManifestError, match=r"passages-00001\.arrow cannot be read"):
        store.get([150])
