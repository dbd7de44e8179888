"""Whatever bytes stand in a file that the product reads, they are read or refused with one short message of ours.

Each format is spoiled in the ways that files are: cut, empty, changed bytes, another encoding, other types, nested without end,
bombed. A sample runs by default, many more changes with the marker `long`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import resource
import subprocess
import sys
import zipfile
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


def initialised(workspace: Path, corpus: str, folder: Path) -> None:
    sets = [f"data.{name}=[q.jsonl]" for name in ("train", "dev", "test")]
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


def test_bombs_are_refused_in_bounded_memory_by_the_real_command(tmp_path: Path) -> None:
    """In a process of its own that may take 1.5 GB; each bomb holds 4 GB."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "c.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 24)) * 256)  # the members of a .gz follow each other
    (source / "q.jsonl").write_bytes(READERS["questions"][1])
    initialised(tmp_path / "w", "c.jsonl.gz", source)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))

    command = [sys.executable, "-m", "research_rl", "run", "download", "-w", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1 and "the line exceeds 16,777,216 bytes" in done.stderr and "Traceback" not in done.stderr, done.stderr[
        -3000:
    ]
