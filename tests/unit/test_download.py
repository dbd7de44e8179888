"""data/ holds checked rows with their set's name, is equal for equal input, and is left alone by a failed download."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.data import download, flashrag
from research_rl.errors import ConfigError, DataError
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current, run_stage
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent

FILES = {
    "corpus": "wiki/corpus.jsonl",
    "train": ["musique/train.jsonl", "hotpotqa/train.jsonl"],
    "dev": ["musique/dev.jsonl"],
    "test": ["musique/dev.jsonl"],
}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    lines(root / "wiki/corpus.jsonl", [{"id": str(n), "contents": f'"T{n}"\ntext {n}'} for n in range(5)])
    for name in ("musique/train", "hotpotqa/train", "musique/dev"):
        row = {"question": "Who?", "golden_answers": ["Ada"], "metadata": {"supporting_passage_ids": ["1"]}}
        lines(root / f"{name}.jsonl", [{"id": f"{name.split('/')[1]}_{n}", **row} for n in range(3)])
    return root


def context(root: Path, **data: Any) -> Context:
    config = Config.model_validate({"data": data})
    return Context(STAGES["download"], config, Workspace(root), {}, silent)


def test_folder_files_are_joined_and_keep_their_set(tmp_path: Path, source: Path) -> None:
    made = context(tmp_path / "w", source="folder", folder=str(source), **FILES)
    download.run(made)
    snapshot = manifest.load(tmp_path / "w/data")
    assert snapshot.counts == {"corpus": 5, "train": 6, "dev": 3, "test": 3}
    questions = list(flashrag.read_questions(tmp_path / "w/data/train.jsonl"))
    assert [q.id for q in questions[:1] + questions[3:4]] == ["musique/train_0", "hotpotqa/train_0"]
    assert questions[3].metadata == {"supporting_passage_ids": ["1"], "data_source": "hotpotqa"}


def test_equal_input_gives_equal_bytes_whatever_the_workspace(tmp_path: Path, source: Path) -> None:
    for name in ("a", "deep/b"):
        download.run(context(tmp_path / name, source="folder", folder=str(source), **FILES))
    for path in (tmp_path / "a/data").iterdir():
        assert path.read_bytes() == (tmp_path / "deep/b/data" / path.name).read_bytes()


def test_a_relative_folder_is_below_the_workspace(tmp_path: Path, source: Path) -> None:
    download.run(context(tmp_path, source="folder", folder=source.name, **FILES))
    assert manifest.load(tmp_path / "data").counts["corpus"] == 5


def test_a_further_file_that_unpacks_to_far_more_than_its_size_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 8 kB filled the disk."""
    monkeypatch.setattr(download, "_HARMLESS", 1 << 20)
    for name, content in (("zeros", bytes(8 << 20)), ("text", b"".join(b"%d\n" % n for n in range(1 << 18)))):
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"zeros.gz has [\d,]+ bytes and unpacks to more than 1,[\d,]+, .*unpack it yourself"):
        download.run(context(tmp_path / "w", source="folder", folder=str(source), files={"index/zeros": ["zeros.gz"]}, **FILES))
    assert not (tmp_path / "w/data").exists()
    download.run(context(tmp_path / "w", source="folder", folder=str(source), files={"index/text": ["text.gz"]}, **FILES))
    assert (tmp_path / "w/data/files/index/text").stat().st_size > 1 << 20


def test_files_of_one_set_in_one_split_keep_their_ids_apart(tmp_path: Path, source: Path) -> None:
    lines(source / "musique/more.jsonl", [{"id": "train_0", "question": "Who?", "golden_answers": ["Ada"]}])
    named = {**FILES, "train": ["musique/train.jsonl", "musique/more.jsonl"]}
    download.run(context(tmp_path, source="folder", folder=str(source), **named))
    ids = [q.id for q in flashrag.read_questions(tmp_path / "data/train.jsonl")]
    assert ids[0] == "musique/train/train_0"
    assert ids[-1] == "musique/more/train_0"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"folder": None}, ConfigError, "data.folder is empty"),
        ({"folder": "/nowhere/at/all"}, DataError, "is not a folder"),
        ({"corpus": "other.jsonl"}, DataError, "has no other.jsonl"),
        ({"train": []}, ConfigError, "data.train"),
        ({"dev": ["musique/dev.jsonl"] * 2}, ConfigError, "twice"),
    ],
)
def test_a_wrong_source_is_named_and_leaves_nothing(
    tmp_path: Path, source: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    named = {"folder": str(source), **FILES, **change}
    with pytest.raises(error, match=says):
        download.run(context(tmp_path / "w", source="folder", **named))
    assert list((tmp_path / "w").iterdir()) == []


def test_a_bad_row_leaves_the_old_snapshot(tmp_path: Path, source: Path) -> None:
    made = context(tmp_path / "w", source="folder", folder=str(source), **FILES)
    download.run(made)
    before = manifest.load(tmp_path / "w/data").hash
    with (source / "musique/dev.jsonl").open("a") as stream:
        stream.write("{oops\n")
    with pytest.raises(DataError, match=r"musique/dev.jsonl:4: .*not JSON"):
        download.run(made)
    assert manifest.load(tmp_path / "w/data").hash == before
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["artifacts", "data"], (
        "the note of what the snapshot took is in artifacts"
    )


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"http://127.0.0.1:9.* at main"):
        download.run(context(tmp_path, source="hub"))
    assert not (tmp_path / "data").exists()


def test_a_symbolic_link_to_another_disk_stays_one(tmp_path: Path, source: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "w/data").symlink_to(tmp_path / "disk/data")
    for _ in range(2):
        download.run(context(tmp_path / "w", source="folder", folder=str(source), **FILES))
        assert (tmp_path / "w/data").is_symlink()
        assert manifest.load(tmp_path / "disk/data").counts["corpus"] == 5
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]


def test_a_changed_folder_makes_the_stage_stale(tmp_path: Path, source: Path) -> None:
    made = context(tmp_path / "w", source="folder", folder=str(source), **FILES)
    _, built = run_stage("download", made.config, made.workspace)
    assert built and current("download", made.config, made.workspace)
    os.utime(source / "wiki/corpus.jsonl")
    assert current("download", made.config, made.workspace), "the same content under a new date is no change"
    with (source / "wiki/corpus.jsonl").open("a") as stream:
        stream.write('{"id": "more", "contents": "one more"}\n')
    assert current("download", made.config, made.workspace) is None
    renewed, built = run_stage("download", made.config, made.workspace)
    assert built and renewed.counts["corpus"] == 6
    source.rename(tmp_path / "moved")
    assert current("download", made.config, made.workspace), "a folder that is not here says nothing"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"url": "http://user:hunter2@host/x"}, "the address at host carries a user or password.*netrc"),
        ({"corpus": "https://host/c.jsonl?X-Amz-Signature=hunter2"}, "carries X-Amz-Signature in its query.*AWS_"),
        ({"train": ["https://host/c.jsonl?a=1&access_token=hunter2"]}, "carries access_token"),
        ({"files": {"x": ["http://hunter2@host/x"]}}, "carries a user or password"),
        ({"corpus": "https://u:hunter2@hub/c"}, "HF_TOKEN"),
        ({"s3_endpoint": "https://u:hunter2@s3"}, "AWS_"),
        ({"url": "http://[::1"}, r"http://... is malformed"),
    ],
)
def test_an_address_with_a_secret_is_refused_before_anything_is_written(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Config.model_validate({"data": data})
    assert "hunter2" not in str(caught.value).split("[type=")[0]


def test_a_name_that_no_file_system_takes_is_named(tmp_path: Path, source: Path) -> None:
    for change in ({"corpus": "x" * 300 + ".jsonl"}, {"files": {"x" * 300: ["musique/dev.jsonl"]}}):
        with pytest.raises((DataError, ConfigError), match="255 bytes"):
            download.run(context(tmp_path / "w", source="folder", folder=str(source), **{**FILES, **change}))
