"""Whatever bytes stand in a file that the product reads, they are read or refused with one short message of ours.

Each format is spoiled in the ways that files are: cut, empty, changed bytes, another encoding, other types, nested without end,
bombed. A sample runs by default, many more changes with the marker `long`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from research_rl.cli import main
from research_rl.config.template_text import template_text
from research_rl.data import flashrag
from research_rl.errors import ResearchError
from research_rl.evaluation.results import read_results, write_results
from research_rl.index.search import VectorIndex
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.serving.model import inspect
from tests.contract import chain_model
from tests.unit.test_report import result

LONGEST_MESSAGE = 1500
ODD: list[Any] = [
    None,
    True,
    -1,
    10**30,
    1.5,
    "",
    "\0",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    ["a", 1],
    "../../etc/passwd",
    "/etc/passwd",
]
QUESTION = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"], "metadata": {"supporting_passage_ids": ["p"]}}
PASSAGE = {"id": "p", "contents": '"Ada"\nA poet.'}


def spoiled(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield changed copies of a file: fixed ones that hurt readers, and `count` with bytes changed, cut, doubled or put in."""
    yield from (b"", b"\0", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000, b"\xef\xbb\xbf" + content, content[: len(content) // 2])
    yield from (content[:-1], content + content, content.replace(b"a", b"\xe9"), content.replace(b"\n", b"\r"))
    yield content.decode("latin-1").encode("utf-16")
    generator = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(len(changed) + 1)
            changed[at : at + generator.choice([0, 1, 1, 4])] = generator.randbytes(generator.choice([0, 1, 4, 8]))
        yield bytes(changed)


def rows_of(fields: dict[str, Any]) -> Iterator[bytes]:
    """Yield one JSON line for each field with each odd value, and without the field."""
    for name in fields:
        yield json.dumps({other: value for other, value in fields.items() if other != name}).encode()
        yield from (json.dumps({**fields, name: value}).encode() for value in ODD)


def questions(path: Path) -> object:
    return list(flashrag.read_questions(path))


def passages(path: Path) -> object:
    return list(flashrag.read_passages(path))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def archive(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("c.jsonl", content)
    return stream.getvalue()


def index_file() -> bytes:
    index = faiss.IndexFlatIP(8)
    index.add(np.eye(8, dtype=np.float32))
    return faiss.serialize_index(index).tobytes()


LINES = b"".join(json.dumps({**PASSAGE, "id": str(n)}).encode() + b"\n" for n in range(20))
READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "questions": ("q.jsonl", json.dumps(QUESTION).encode() + b"\n", questions),
    "questions in parquet": ("q.parquet", parquet([QUESTION]), questions),
    "passages": ("c.jsonl", LINES, passages),
    "a table": ("c.tsv", b"id\ttext\ttitle\n1\tA poet.\tAda\n2\t\"said \"\"no\"\"\"\tB\n", passages),
    "gz": ("c.jsonl.gz", gzip.compress(LINES), passages),
    "bz2": ("c.jsonl.bz2", bz2.compress(LINES), passages),
    "xz": ("c.jsonl.xz", lzma.compress(LINES), passages),
    "zst": ("c.jsonl.zst", zstandard.compress(LINES), passages),
    "zip": ("c.jsonl.zip", archive(LINES), passages),
    "a prompt template": ("p.txt", b"Answer: {question}\n", lambda path: template_text.__wrapped__("file", str(path))),
    "a faiss index": ("i.faiss", index_file(), VectorIndex.open),
}  # fmt: skip


def read(path: Path, content: bytes, reader: Callable[[Path], object]) -> bool:
    """Whether a file is read; a refusal must be one line of ours that names the file."""
    path.write_bytes(content)
    try:
        reader(path)
    except ResearchError as error:
        text = str(error)
        assert len(text) < LONGEST_MESSAGE and "\n" not in text and path.parent.name in text, text[:3000]
        return False
    return True


def held(name: str, folder: Path, count: int, seed: int) -> None:
    file, content, reader = READERS[name]
    assert read(folder / file, content, reader), "what is to be spoiled is good"
    assert not all(read(folder / file, changed, reader) for changed in spoiled(content, count, seed))


@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_read_or_named(name: str, tmp_path: Path) -> None:
    held(name, tmp_path, 60, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_a_file_spoiled_in_thousands_of_ways_is_read_or_named(name: str, tmp_path: Path) -> None:
    held(name, tmp_path, 5000, 2)


@pytest.mark.parametrize(("fields", "reader"), [(QUESTION, questions), (PASSAGE, passages)], ids=["questions", "passages"])
def test_a_field_of_another_type_is_read_or_named(fields: dict[str, Any], reader: Callable[[Path], object], tmp_path: Path) -> None:
    refused = [read(tmp_path / "f.jsonl", row, reader) for row in rows_of(fields)].count(False)
    assert refused > len(fields)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_model.build(tmp_path_factory.mktemp("m") / "model", {"tick": "tock", "tock": "tick"})


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json"]


def spoiled_model(folder: Path, name: str, contents: Iterator[bytes]) -> list[bool]:
    original = (folder / name).read_bytes() if (folder / name).is_file() else None
    try:
        return [read(folder / name, content, lambda path: inspect(path.parent)) for content in contents]
    finally:
        (folder / name).unlink()
        if original is not None:
            (folder / name).write_bytes(original)


@pytest.mark.parametrize("name", FILES)
def test_a_model_folder_with_a_spoiled_file_is_taken_or_named(name: str, model: Path) -> None:
    content = (model / name).read_bytes() if (model / name).is_file() else b'{"weight_map": {"a": "model.safetensors"}}'
    assert False in spoiled_model(model, name, spoiled(content, 40, 3))
    inspect(model)


def test_a_models_configuration_with_odd_values_is_taken_or_named(model: Path) -> None:
    described = json.loads((model / "config.json").read_text())
    known = ("architectures", "num_hidden_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "text_config")
    contents = [json.dumps({**described, name: value}).encode() for name in known for value in [*ODD, 10**12, "many"]]
    assert False in spoiled_model(model, "config.json", iter(contents))


@pytest.mark.parametrize("value", [*ODD, {"a": "../x.safetensors"}, {"a": "/x"}, {"a": 1}, {"a": "b\0"}], ids=range(len(ODD) + 4))
def test_an_index_of_weights_that_leads_elsewhere_is_named(value: Any, model: Path) -> None:
    assert spoiled_model(model, "model.safetensors.index.json", iter([json.dumps({"weight_map": value}).encode()])) == [False]


HEADERS: list[Any] = [
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
    {"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
    {"a": []},
    [1],
    "a",
    None,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_of_weights_with_odd_values_is_named(header: Any, model: Path) -> None:
    text = json.dumps(header).encode()
    assert spoiled_model(model, "model.safetensors", iter([len(text).to_bytes(8, "little") + text + b"\0" * 4])) == [False]


def published(folder: Path) -> Path:
    with manifest.publish(folder, "index", "c0", {}) as staging:
        (staging.path / "a").write_text("a")
    return folder / "manifest.json"


def test_a_spoiled_manifest_is_named_or_lists_what_stands_in_its_folder(tmp_path: Path) -> None:
    path = published(tmp_path / "index")
    content = path.read_bytes()
    tree = {name: value for name, value in json.loads(content).items() if name != "seal"}
    odd = [json.dumps({**tree, name: value}).encode() for name in tree for value in [*ODD, "\ud800"]]
    files = [
        json.dumps({**tree, "files": [{**tree["files"][0], "path": value}]}).encode() for value in [*ODD, "..", "a/../../x", "y" * 300]
    ]
    for changed in [*odd, *files, *spoiled(content, 200, 4)]:
        if changed != content and read(path, changed, lambda path: manifest.load(path.parent)):
            assert {entry.path for entry in manifest.load(path.parent).files} <= {"a"}, changed
    path.unlink()
    path.mkdir()
    with pytest.raises(ResearchError, match=r"manifest\.json cannot be read"):
        manifest.load(path.parent)


def test_spoiled_results_are_named_with_their_line(tmp_path: Path) -> None:
    write_results(tmp_path, [result(0, "Ada")])
    content = (tmp_path / "results.jsonl").read_bytes()
    record = json.loads(content)
    contents = [*spoiled(content, 40, 5), *(json.dumps({**record, name: None}).encode() for name in ("golden_answers", "row"))]
    assert False in [read(tmp_path / "results.jsonl", changed, lambda path: read_results(path.parent)) for changed in contents]


def initialised(workspace: Path, corpus: str, folder: Path, questions: str = "q.jsonl") -> None:
    sets = [f"data.{name}=[{questions}]" for name in ("train", "dev", "test")]
    assert main(["init", "-w", str(workspace), "data.source=folder", f"data.folder={folder}", f"data.corpus={corpus}", *sets]) == 0


HOSTILE = {
    "c.jsonl": b'{"id": 1, "contents": ' + b"[" * 50_000,
    "c.tsv": b"id\ttext\ttitle\n1\t\"never closed\tT\n",
    "c.jsonl.gz": gzip.compress(LINES)[:-9],
    "c.jsonl.bz2": b"BZh9" + bytes(400),
    "c.jsonl.zst": zstandard.compress(LINES)[:-2],
    "c.zip": archive(LINES)[:-30],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_the_command_line_refuses_a_hostile_source_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, workspace = tmp_path / "source", tmp_path / "w"
    source.mkdir()
    (source / name).write_bytes(HOSTILE[name])
    (source / "q.jsonl").write_bytes(READERS["questions"][1])
    initialised(workspace, name, source)
    capsys.readouterr()
    assert main(["run", "download", "-w", str(workspace)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("research: ")]
    assert len(said) == 1 and name in said[0] and len(said[0]) < LONGEST_MESSAGE, said
    assert not (workspace / "data").exists() and not list(workspace.glob(".data.*")), sorted(workspace.iterdir())


ROOM = 3 << 27
"""Bytes that the command may take beside what it has at its start; each bomb holds or stands for more."""
BLOCK = bytes(1 << 24)
BLOCKS = 2 * ROOM // len(BLOCK)
LONG_LINE = "the line exceeds 16,777,216 bytes"


def zip_bomb() -> bytes:
    """An archive whose only file is zeros; flushed whole, its blocks can follow each other."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_STORED) as made:
        made.writestr("c.jsonl", packed := block * BLOCKS)
    content = bytearray(stored.getvalue())
    # Method 8 in the file's own header and in the archive's list; the sizes there are only read for their ends.
    listed = content.rindex(b"PK\x01\x02")
    content[8:10] = content[listed + 10 : listed + 12] = zipfile.ZIP_DEFLATED.to_bytes(2, "little")
    content[listed + 24 : listed + 28] = (2 * ROOM - 1).to_bytes(4, "little")
    assert len(packed) < 1 << 22
    return bytes(content)


def large_dictionary() -> bytes:
    """An .xz file that asks for a window of 4 GiB: the size stands in one byte of a header with a checksum of its own."""
    content = bytearray(lzma.compress(LINES))
    size = (content[12] + 1) * 4
    content[16] = 40
    content[12 + size - 4 : 12 + size] = zlib.crc32(content[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(content)


def columns(texts: Any, answers: Any, **options: Any) -> bytes:
    """A parquet file whose first row has a blank id: whoever reads row by row is not hurt by those behind it."""
    stream = io.BytesIO()
    table = pa.table({"id": ["", *map(str, range(1, len(answers)))], "question": texts, "golden_answers": answers})
    pq.write_table(
        table, stream, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False, write_statistics=False, **options
    )
    return stream.getvalue()


def repeated(count: int) -> Any:
    """A column that names one text of 1 MiB `count` times."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["x" * (1 << 20)]))


def bombs() -> dict[str, tuple[str, bytes, str]]:
    """Small files that take much memory when they are read carelessly: name, content, what the refusal says."""
    many = 2 * ROOM >> 20
    within, nothing = (
        pa.ListArray.from_arrays(pa.array([0, len(of)], pa.int32()), of) for of in (repeated(many), pa.nulls(1 << 26, pa.string()))
    )
    prefixed = {"use_dictionary": False, "column_encoding": {"question": "DELTA_BYTE_ARRAY"}}
    table = b"".join(map(lzma.compress, [b"id\ttext\ttitle\n1\t", *[BLOCK] * 2]))
    return {
        "gz": ("c.jsonl.gz", gzip.compress(BLOCK) * BLOCKS, LONG_LINE),
        "bz2": ("c.jsonl.bz2", bz2.compress(BLOCK) * BLOCKS, LONG_LINE),
        "xz": ("c.jsonl.xz", lzma.compress(BLOCK) * BLOCKS, LONG_LINE),
        "zst": ("c.jsonl.zst", zstandard.compress(BLOCK) * BLOCKS, LONG_LINE),
        "zip": ("c.jsonl.zip", zip_bomb(), LONG_LINE),
        "table": ("c.tsv.xz", table, LONG_LINE),
        "xz window": ("c.jsonl.xz", large_dictionary(), "needs more than 128 MiB of memory"),
        "questions": ("q.jsonl.xz", lzma.compress(BLOCK) * BLOCKS, LONG_LINE),
        "a text named by every row": ("q.parquet", columns(repeated(many), [["a"]] * many), "id='' is blank"),
        "a text named within a row": ("q.parquet", columns(["a"], within), "the row takes 805,"),
        "a row of nothing, often": ("q.parquet", columns(["a"], nothing), "row group 0 takes up to 1,0"),
        "texts that repeat others": ("q.parquet", columns(repeated(many).cast(pa.string()), [["a"]] * many, **prefixed), "id='' is blank"),
    }  # fmt: skip


BURST = """
import json, resource, sys
from research_rl.cli import main
import research_rl.data.columns_file, research_rl.data.flashrag, pyarrow.parquet, zstandard
data = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[1]), data + int(sys.argv[1])))
for workspace in sys.argv[2:]:
    print("ends with", main(["run", "download", "-w", workspace]), file=sys.stderr, flush=True)
"""


def test_bombs_are_refused_in_bounded_memory_by_the_real_command(tmp_path: Path) -> None:
    """In a process of its own that may take 384 MiB beside what it starts with."""
    made = bombs()
    for place, (name, content, _) in enumerate(made.values()):
        (source := tmp_path / f"s{place}").mkdir()
        for file, text in {"q.jsonl": READERS["questions"][1], "c.jsonl": READERS["passages"][1], name: content}.items():
            (source / file).write_bytes(text)
        corpus, questions = (name, "q.jsonl") if name.startswith("c") else ("c.jsonl", name)
        initialised(tmp_path / f"w{place}", corpus, source, questions)
    spaces = [tmp_path / f"w{place}" for place in range(len(made))]
    command = [sys.executable, "-c", BURST, str(ROOM), *map(str, spaces)]
    # Arrow's own pool reserves more than it uses.
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr[-3000:]
    for name, told, (_, _, says) in zip(made, done.stderr.split("ends with 1\n"), made.values(), strict=False):
        assert told.count("research: ") == 1 and says in told and len(told) < LONGEST_MESSAGE, (name, told[-3000:])
    assert done.stderr.count("ends with 1\n") == len(made)
    assert not any((space / "data").exists() or list(space.glob(".data.*")) for space in spaces)
