"""Every defect of a corpus or question file gives one message with file, line, value and remedy."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from research_rl.data import flashrag
from research_rl.errors import DataError
from research_rl.trajectory import Passage

GOOD = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"], "metadata": {"hops": 2}}


def write(path: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_reads_questions_in_order_and_writes_them_back(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, {"id": 7, "question": "Où?", "golden_answers": ["là"]})
    found = list(flashrag.read_questions(path))
    assert [q.id for q in found] == ["q1", "7"]
    assert found[0].metadata == {"hops": 2}
    again = tmp_path / "again.jsonl"
    again.write_bytes(b"".join(map(flashrag.to_line, found)))
    assert list(flashrag.read_questions(again)) == found


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".zip"])
def test_reads_compressed_corpora(tmp_path: Path, suffix: str) -> None:
    path, line = tmp_path / f"corpus{suffix}", b'{"id": "0", "contents": "\\"T\\"\\nx"}\r\n\n{"id": "1", "contents": "y"}'
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("corpus.jsonl", line)
    else:
        path.write_bytes(gzip.compress(line) if suffix.endswith(".gz") else line)
    assert list(flashrag.read_passages(path)) == [Passage("0", '"T"\nx'), Passage("1", "y")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{not json", ["is not JSON", "one JSON object a line"]),
        ("[1]", ["is a list", "not an object"]),
        ({"id": "a", "question": "Who?"}, ["no 'golden_answers'"]),
        ({**GOOD, "id": "a", "golden_answers": []}, ["golden_answers=[]", "add at least one answer"]),
        ({**GOOD, "id": "a", "golden_answers": "Ada"}, ["golden_answers='Ada' is a str", "list of strings"]),
        ({**GOOD, "id": "a", "golden_answers": [" "]}, ["golden_answers=' ' is blank"]),
        ({**GOOD, "id": "a", "question": " "}, ["question=' ' is blank"]),
        ({**GOOD, "id": None}, ["id=None is a NoneType"]),
        ({**GOOD, "id": "a", "metadata": [1]}, ["metadata=[1] is a list"]),
        ('{"id": "a", "question": "\\ud800", "golden_answers": ["x"]}', ["half a surrogate pair"]),
        (b'{"id": "a", "question": "\xff\xfe", "golden_answers": ["x"]}', ["not UTF-8", "ff fe"]),
        (GOOD, ["id='q1' was already used in line 1", "its own id"]),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, row: Any, says: list[str]) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(DataError) as caught:
        list(flashrag.read_questions(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert "\n" not in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "a"}, "no 'contents'"),
        ({"id": "a", "contents": ""}, "contents='' is blank"),
        ({"id": "0", "contents": "z"}, "already used in line 1"),
    ],
)
def test_a_bad_passage_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "c.jsonl", {"id": "0", "contents": "x"}, row)
    with pytest.raises(DataError, match=says) as caught:
        list(flashrag.read_passages(path))
    assert f"{path}:2:" in str(caught.value)


def test_missing_empty_and_damaged_files_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"id": "0", "contents": "x"}\n' * 1000)[:-20])
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    for path, says in [
        (tmp_path / "no.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (cut, "cut off"),
        (tmp_path / "empty.jsonl", "no row"),
    ]:
        with pytest.raises(DataError, match=says):
            list(flashrag.read_passages(path))


def test_colliding_hashes_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashrag, "hash", lambda _: 1, raising=False)
    path = write(tmp_path / "c.jsonl", {"id": "0", "contents": "x"}, {"id": "1", "contents": "y"})
    assert len(list(flashrag.read_passages(path))) == 2
