"""Every defect of a corpus or question file gives one message with file, line, value and remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from research_rl.data import columns_file, flashrag
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError

GOOD = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"], "metadata": {"hops": 2}}


def write(path: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_reads_questions_in_order_and_writes_them_back(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, {"id": 7, "question": "Où?", "golden_answers": ["là"]})
    questions = list(flashrag.read_questions(path))
    assert [q.id for q in questions] == ["q1", "7"]
    assert questions[0].metadata == {"hops": 2}
    again = tmp_path / "again.jsonl"
    again.write_bytes(b"".join(map(flashrag.to_line, questions)))
    assert list(flashrag.read_questions(again)) == questions


def packed(path: Path, content: bytes) -> Path:
    """Write the content the way the path's ending says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "no data")
            archive.writestr(f"folder/{path.stem}", content)
    else:
        pack = {
            ".gz": lambda plain: gzip.compress(plain, 1),
            ".bz2": bz2.compress,
            ".xz": lzma.compress,
            ".zst": zstandard.ZstdCompressor().compress,
        }
        path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


SUFFIXES = ["", ".gz", ".zip", ".zst", ".bz2", ".xz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reads_compressed_corpora(tmp_path: Path, suffix: str) -> None:
    line = b'{"id": "0", "contents": "\\"T\\"\\nx"}\r\n\n{"id": "1", "contents": "y"}'
    path = packed(tmp_path / f"corpus.jsonl{suffix}", line)
    assert list(flashrag.read_passages(path)) == [Passage("0", '"T"\nx'), Passage("1", "y")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("damaged.jsonl.bz2", r"is cut off or damaged \(.*\); fetch it again"),
        ("text.jsonl.bz2", "is cut off or damaged"),
        ("encrypted.zip", "a.jsonl is encrypted; .*without a password"),
        ("deflate64.zip", "is packed by method 9, only 8"),
        ("long.jsonl.zst", r"needs more than 128 MiB of memory .*`zstd --long=27`"),
        ("long.jsonl.xz", r"needs more than 128 MiB of memory .*`xz -9`"),
    ],
)
def test_an_archive_that_cannot_be_read_says_why(tmp_path: Path, name: str, says: str) -> None:
    rows = b"".join(b'{"id": "%d", "contents": "%d"}\n' % (n, n * n) for n in range(5000))
    bzip2 = bz2.compress(rows)
    plain, encrypted, deflate64 = (archive(tmp_path, rows, flag, method) for flag, method in ((0, 8), (1, 8), (0, 9)))
    assert plain != encrypted != deflate64
    content = {
        "damaged.jsonl.bz2": bzip2[:500] + bytes(byte ^ 255 for byte in bzip2[500:600]) + bzip2[600:],
        "text.jsonl.bz2": rows,
        "encrypted.zip": encrypted,
        "deflate64.zip": deflate64,
        "long.jsonl.zst": framed(rows, 28),
        "long.jsonl.xz": large_window(lzma.compress(rows)),
    }
    (tmp_path / name).write_bytes(content[name])
    with pytest.raises(DataError, match=says) as caught:
        list(flashrag.read_passages(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def archive(folder: Path, rows: bytes, flag: int, method: int) -> bytes:
    """Return a .zip whose headers state this flag (1: encrypted) and method of compression (9: deflate64)."""
    packed(folder / "made.zip", rows)
    with zipfile.ZipFile(folder / "made.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.jsonl", rows)
    content = bytearray((folder / "made.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(signature) + offset
        content[place] |= flag
        content[place + 2] = method
    return bytes(content)


def large_window(stream: bytes) -> bytes:
    """Return the .xz stream with a dictionary of 1 GiB in the header of its block, as `xz --lzma2=dict=1GiB` writes it."""
    header = bytearray(stream[12 : 12 + 4 * (stream[12] + 1)])
    header[header.index(b"\x21\x01") + 2] = 36
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    return stream[:12] + bytes(header) + stream[12 + len(header) :]


def framed(rows: bytes, window_log: int) -> bytes:
    """Return a Zstandard frame of unknown content size, as `zstd --long` writes it to a pipe."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return frame.compress(rows) + frame.flush()


@pytest.mark.parametrize("ending", ["jsonl", "tsv", *(f"jsonl{suffix}" for suffix in SUFFIXES[1:])])
def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path: Path, ending: str) -> None:
    """Of a line far above the limit, packed into some kB or not, only a small part is ever in memory."""
    path = packed(tmp_path / f"c.{ending}", bytes((24 if ending.endswith((".bz2", ".xz")) else 160) << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r":1: the line exceeds 16,777,216 bytes, the longest that is read"):
            list(flashrag.read_passages(path))
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_cut_or_altered_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(b'{"id": "%d", "contents": "%d"}\n' % (n, n * n) for n in range(5000))
    path = packed(tmp_path / f"corpus.jsonl{suffix}", rows)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cut off or damaged"):
            list(flashrag.read_passages(path))


def test_padding_and_further_streams_of_xz_are_read(tmp_path: Path) -> None:
    first, second = b'{"id": "0", "contents": "a"}\n', b'{"id": "1", "contents": "b"}\n'
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(first) + bytes(4096) + lzma.compress(second) + bytes(4))
    assert [p.id for p in flashrag.read_passages(tmp_path / "c.jsonl.xz")] == ["0", "1"]


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


@pytest.mark.parametrize("title", ["", " ", None])
def test_an_empty_title_is_no_title(tmp_path: Path, title: str | None) -> None:
    """As in BEIR's Quora, where no passage has one."""
    path = write(tmp_path / "c.jsonl", {"id": "1", "title": title, "text": "How do I learn to swim?"})
    assert list(flashrag.read_passages(path)) == [Passage("1", "How do I learn to swim?")]
    with pytest.raises(DataError, match="title=7 is a int"):
        list(flashrag.read_passages(write(tmp_path / "c.jsonl", {"id": 1, "title": 7, "text": "x"})))


@pytest.mark.parametrize(("value", "ids"), [("12", ["12"]), (7, ["7"]), (["a", 3], ["a", "3"]), (None, []), ([], [])])
def test_supporting_passages_are_ids_not_letters(tmp_path: Path, value: Any, ids: list[str]) -> None:
    path = write(tmp_path / "q.jsonl", {**GOOD, "metadata": {"supporting_passage_ids": value}})
    assert flashrag.supporting_ids(next(flashrag.read_questions(path))) == ids


TABLE = (
    'id\ttext\ttitle\n1\t"Ada said ""no""\tand left."\tAda\n2\tplain, with "quotes" inside\t"Tab\tTitle"\n3\t"one line"\tÜ\n4\tno title\t\n'
)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zip"])
def test_reads_the_table_of_dpr(tmp_path: Path, suffix: str) -> None:
    path = packed(tmp_path / f"psgs.tsv{suffix}", TABLE.encode())
    assert list(flashrag.read_passages(path)) == [
        Passage("1", '"Ada"\nAda said "no"\tand left.'),
        Passage("2", '"Tab\tTitle"\nplain, with "quotes" inside'),
        Passage("3", '"Ü"\none line'),
        Passage("4", "no title"),
    ]


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        (["id\ttext", "1\tx"], 1, "the columns are ['id', 'text']; name them id, text and title"),
        (["id\ttext\ttitle", "1\tx"], 2, "the row has 2 fields; write three"),
        (["id\ttext\ttitle", "1\t \tT"], 2, "text=' ' is blank"),
        (["id\ttext\ttitle", "1\tx\tT", "1\ty\tT"], 3, "id='1' was already used in line 2"),
        (["id\ttext\ttitle", '1\t"x\tT', "2\ty\tT"], 2, "a quoted field is not closed in '1\\t\"x\\tT'; close it in the same line"),
        (["id\ttext\ttitle", '1\t"x\tT', '2\ty"\tT', "3\tz\tT"], 2, "a quoted field is not closed"),
        (["id\ttext\ttitle", '1\t"two', 'lines"\tT'], 2, "a quoted field is not closed"),
        (["id\ttext\ttitle", '1\t"x" (song)\tT'], 2, "text follows a closing quote"),
        (["id\ttext\ttitle", "1\tx\ry\tT"], 2, "a carriage return stands inside the row; remove it"),
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
        ({**GOOD, "id": "a", "metadata": {"supporting_passage_ids": {"1": 2}}}, ["supporting_passage_ids={'1': 2}", "list of passage ids"]),
        ({**GOOD, "id": "a", "metadata": {"supporting_passage_ids": [True]}}, ["supporting_passage_ids=[True]"]),
        ({**GOOD, "id": "a", "metadata": {"supporting_passage_ids": 1.5}}, ["supporting_passage_ids=1.5"]),
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


def test_question_files_of_parquet_are_read_in_both_shapes(tmp_path: Path) -> None:
    """FlashRAG's columns, and verl's alone as Search-R1's script writes them."""
    prompt = [{"role": "user", "content": "Answer the given question. ... Question: Who is it?\n"}]
    truth = {"style": "rule", "ground_truth": {"target": ["Ada", "A."]}}
    verl = {"data_source": "nq", "prompt": prompt, "reward_model": truth, "extra_info": {"split": "train", "index": 3}}
    for name, row, ids in (("f", GOOD, "q1"), ("v", verl, "nq_3"), ("b", {**verl, **GOOD}, "q1")):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
        (question,) = flashrag.read_questions(tmp_path / f"{name}.parquet")
        assert (question.id, question.question) == (ids, "Who is it?" if name == "v" else "Who?")
        assert question.golden_answers == (("Ada", "A.") if name == "v" else ("Ada",))
    for content, says in ((b"PAR1", "no whole parquet file"), (b"", "no whole parquet file")):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(DataError, match=says):
            list(flashrag.read_questions(tmp_path / "bad.parquet"))
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet:1: the row has no 'id'"):
        list(flashrag.read_questions(tmp_path / "other.parquet"))


def test_a_parquet_file_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_file, "_MOST_BYTES", 100_000)
    row = {"id": "a", "question": "Who? " + "x" * 200, "golden_answers": ["Ada"]}
    pq.write_table(pa.Table.from_pylist([row | {"id": f"a{n}"} for n in range(2000)]), tmp_path / "q.parquet", use_dictionary=False)
    with pytest.raises(DataError, match=r"row group 0 takes up to [\d,]+ bytes when it is read, the limit is 100,000; .*row_group_size"):
        list(flashrag.read_questions(tmp_path / "q.parquet"))
    pq.write_table(pq.read_table(tmp_path / "q.parquet"), tmp_path / "small.parquet", row_group_size=200, use_dictionary=False)
    assert len(list(flashrag.read_questions(tmp_path / "small.parquet"))) == 2000
