"""Read and write FlashRAG's JSON-lines formats one row at a time. Knows rows and lines; knows no source, no stage.

Invariants: (1) every row handed out is complete and of the right types; (2) the first bad line ends the reading with one
DataError that names file, line, value and remedy; (3) memory stays flat: eight bytes a row for the duplicate check.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from array import array
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from research_rl.errors import DataError
from research_rl.trajectory import Passage

__all__ = ["Question", "read_passages", "read_questions", "supporting_ids", "to_line"]

_SHOWN = 80
_CORPUS_FORM = 'a passage is {"id": "...", "contents": "..."}'
_QUESTION_FORM = 'a question is {"id": "...", "question": "...", "golden_answers": ["..."], "metadata": {}}'


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its accepted answers; `metadata` is the set's own."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: dict[str, Any]


def read_passages(path: Path) -> Iterator[Passage]:
    """Yield the passages of a corpus file (.jsonl, .jsonl.gz, or a .zip with one member), in order.

    Raises DataError for a line that is not JSON or not UTF-8, a missing or blank field, and, at the end, repeated ids.
    """
    ids = _Ids()
    for number, row in _rows(path, _CORPUS_FORM):
        where = _Where(path, number, _CORPUS_FORM)
        passage = Passage(where.identifier(row), where.text(row, "contents"))
        ids.add(passage.id)
        yield passage
    if ids.repeated():
        _name_repeated(path, ids.repeated(), _CORPUS_FORM)


def read_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a file, in order. Raises DataError as `read_passages`, and for a question without answers."""
    ids = _Ids()
    for number, row in _rows(path, _QUESTION_FORM):
        where = _Where(path, number, _QUESTION_FORM)
        question = Question(where.identifier(row), where.text(row, "question"), where.answers(row), where.metadata(row))
        ids.add(question.id)
        yield question
    if ids.repeated():
        _name_repeated(path, ids.repeated(), _QUESTION_FORM)


def to_line(row: Passage | Question) -> bytes:
    """Return the row as one line of UTF-8 JSON; the same bytes for the same row."""
    if isinstance(row, Passage):
        fields: dict[str, Any] = {"id": row.id, "contents": row.contents}
    else:
        fields = {"id": row.id, "question": row.question, "golden_answers": row.golden_answers, "metadata": row.metadata}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def supporting_ids(question: Question) -> list[str]:
    """Return the ids of the passages that support the answer; empty where the set does not say."""
    return [str(item) for item in question.metadata.get("supporting_passage_ids") or ()]


@dataclass(frozen=True, slots=True)
class _Where:
    """One line of one file: takes fields out of its row or says what is wrong with them."""

    path: Path
    number: int
    form: str

    def error(self, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.path}:{self.number}: {problem}; {remedy}; {self.form}")

    def field(self, row: dict[str, Any], key: str) -> Any:
        if key not in row:
            raise self.error(f"the row has no {key!r}, only {sorted(row)}", f"add {key!r} or remove the line")
        return row[key]

    def identifier(self, row: dict[str, Any]) -> str:
        value = self.field(row, "id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._filled(value, "id")

    def text(self, row: dict[str, Any], key: str) -> str:
        return self._filled(self.field(row, key), key)

    def answers(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = self.field(row, "golden_answers")
        if not isinstance(value, list):
            raise self.error(f"golden_answers={_show(value)} is a {type(value).__name__}", "write a list of strings")
        if not value:
            raise self.error("golden_answers=[] holds no answer", "add at least one answer or remove the line")
        return tuple(self._filled(item, "golden_answers") for item in cast(list[Any], value))

    def metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        value = row.get("metadata")
        if value is not None and not isinstance(value, dict):
            raise self.error(f"metadata={_show(value)} is a {type(value).__name__}", "write an object or leave it out")
        return cast(dict[str, Any], value or {})

    def _filled(self, value: Any, key: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{key}={_show(value)} is a {type(value).__name__}", "write a string")
        if not value.strip():
            raise self.error(f"{key}={_show(value)} is blank", "fill it in or remove the line")
        if not value.isascii():
            self._encodable(value, key)
        return value

    def _encodable(self, value: str, key: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{key} holds half a surrogate pair at character {error.start}", "write the file anew as UTF-8") from None


def _rows(path: Path, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers (from 1) and rows; blank lines are skipped."""
    empty = True
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            empty = False
            yield number, _parse(_Where(path, number, form), line)
    if empty:
        raise DataError(f"{path} holds no row; at least one is needed; {form}")


def _parse(where: _Where, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if where.number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        bad = line[error.start : error.start + 4].hex(" ")
        raise where.error(f"byte {error.start} of the line ({bad}) is not UTF-8", "write the file anew as UTF-8") from None
    except (ValueError, RecursionError) as error:
        shown = _show(line.decode(errors="replace").rstrip("\n"))
        raise where.error(f"{shown} is not JSON ({error})", "write one JSON object a line") from None
    if not isinstance(row, dict):
        raise where.error(f"{_show(row)} is a {type(row).__name__}, not an object", "write one JSON object a line")
    return cast(dict[str, Any], row)


@contextmanager
def _lines(path: Path) -> Generator[Iterator[bytes]]:
    """Open a file, decompressing by its name. Raises DataError for a missing or damaged file."""
    try:
        with _stream(path) as stream:
            yield iter(stream)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct data.folder or the file's name in data.*") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name a file of JSON lines") from None
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is cut off or damaged ({error}); fetch it again") from None


@contextmanager
def _stream(path: Path) -> Generator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            yield cast(BinaryIO, stream)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_only_member(path, archive)) as stream:
            yield io.BufferedReader(cast(Any, stream), 1 << 20)
    else:
        with path.open("rb", buffering=1 << 20) as stream:
            yield stream


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX")]
    if len(names) != 1:
        raise DataError(f"{path} holds {len(names)} .jsonl files; exactly one is needed")
    return names[0]


class _Ids:
    """Finds repeated ids with one 64-bit hash a row."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._repeated: frozenset[int] | None = None

    def add(self, identifier: str) -> None:
        self._hashes.append(hash(identifier))

    def repeated(self) -> frozenset[int]:
        """Return the hashes that occur more than once; all but never a mere collision."""
        if self._repeated is None:
            values = np.frombuffer(self._hashes, dtype=np.int64) if self._hashes else np.empty(0, np.int64)
            ordered = np.sort(values)
            self._repeated = frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        return self._repeated


def _name_repeated(path: Path, hashes: frozenset[int], form: str) -> None:
    """Read again and raise for the first id that truly occurs twice; return when the hashes merely collided."""
    seen: dict[str, int] = {}
    for number, row in _rows(path, form):
        identifier = str(row["id"])
        if hash(identifier) not in hashes:
            continue
        if identifier in seen:
            problem = f"id={_show(identifier)} was already used in line {seen[identifier]} ({len(hashes)} ids repeat)"
            raise _Where(path, number, form).error(problem, "give every row its own id")
        seen[identifier] = number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
