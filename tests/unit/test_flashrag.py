"""Every defect of a corpus or question file gives one message with file, line, value and remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from research_rl.data import flashrag
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError

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


def packed(path: Path, content: bytes) -> Path:
    """Write the content the way the path's ending says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "no data")
            archive.writestr(f"folder/{path.stem}", content)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
        path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


SUFFIXES = ["", ".gz", ".zip", ".zst", ".bz2", ".xz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reads_compressed_corpora(tmp_path: Path, suffix: str) -> None:
    line = b'{"id": "0", "contents": "\\"T\\"\\nx"}\r\n\n{"id": "1", "contents": "y"}'
    path = packed(tmp_path / f"corpus.jsonl{suffix}", line)
    assert list(flashrag.read_passages(path)) == [Passage("0", '"T"\nx'), Passage("1", "y")]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_cut_or_altered_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(b'{"id": "%d", "contents": "%d"}\n' % (n, n * n) for n in range(5000))
    path = packed(tmp_path / f"corpus.jsonl{suffix}", rows)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cut off or damaged"):
            list(flashrag.read_passages(path))


def test_frames_of_zstandard_and_members_of_gzip_follow_each_other(tmp_path: Path) -> None:
    first, second = b'{"id": "0", "contents": "a"}\n', b'{"id": "1", "contents": "b"}\n'
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(first) + zstandard.compress(second))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    for suffix in (".zst", ".gz"):
        assert [p.id for p in flashrag.read_passages(tmp_path / f"c.jsonl{suffix}")] == ["0", "1"]


def test_title_and_text_become_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"id": 1, "title": "Ada", "text": "A poet's daughter."})
    assert list(flashrag.read_passages(path)) == [Passage("1", '"Ada"\nA poet\'s daughter.')]
    with pytest.raises(DataError, match=r"c.jsonl:1: the row has no 'title'"):
        list(flashrag.read_passages(write(tmp_path / "c.jsonl", {"id": 1, "text": "x"})))


TABLE = 'id\ttext\ttitle\n1\t"Ada said ""no""\tand left."\tAda\n2\tplain, with "quotes" inside\t"Tab\tTitle"\n3\t"two\nlines"\tÜ\n'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zip"])
def test_reads_the_table_of_dpr(tmp_path: Path, suffix: str) -> None:
    path = packed(tmp_path / f"psgs.tsv{suffix}", TABLE.encode())
    assert list(flashrag.read_passages(path)) == [
        Passage("1", '"Ada"\nAda said "no"\tand left.'),
        Passage("2", '"Tab\tTitle"\nplain, with "quotes" inside'),
        Passage("3", '"Ü"\ntwo\nlines'),
    ]


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        (["id\ttext", "1\tx"], 1, "the columns are ['id', 'text']; name them id, text and title"),
        (["id\ttext\ttitle", "1\tx"], 2, "the row has 2 fields; write three"),
        (["id\ttext\ttitle", "1\t \tT"], 2, "text=' ' is blank"),
        (["id\ttext\ttitle", "1\tx\tT", "1\ty\tT"], 3, "id='1' was already used in line 2"),
        (["id\ttext\ttitle", '1\t"x\tT', "2\ty\tT"], 3, "unexpected end of data; close every quoted field"),
        (["id\ttext\ttitle", '1\t"x" (song)\tT'], 2, "close every quoted field"),
        (["id\ttext\ttitle", b"1\t\xff\tT"], 2, "is not UTF-8"),
        (["id\ttext\ttitle"], None, "holds no row"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, rows: list[str | bytes], line: int | None, says: str) -> None:
    path = write(tmp_path / "c.tsv", *rows)
    with pytest.raises(DataError) as caught:
        list(flashrag.read_passages(path))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path} ")


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
