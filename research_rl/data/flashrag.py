"""Read FlashRAG's JSON lines and DPR's table (TSV) one row at a time, write JSON lines. Knows rows and lines; knows no source, no stage.

Invariants: (1) every row handed out is complete and of the right types; (2) the first bad line ends the reading with one
DataError that names file, line, value and remedy; (3) memory stays flat: one line, and eight bytes a row for the duplicate check;
(4) one line is one row, in tables too.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from research_rl.data import columns_file
from research_rl.data.compressed import LONGEST_LINE, lines, open_plain
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError

__all__ = ["Question", "read_passages", "read_questions", "supporting_ids", "to_line"]

_SHOWN = 80
_SUPPORT = "supporting_passage_ids"
_CORPUS_FORM = 'a passage is {"id": "...", "contents": "..."} or {"id": "...", "title": "...", "text": "..."}'
_TABLE_FORM = "a passage is id, text and title between tabs, below a line that names these columns"
_QUESTION_FORM = 'a question is {"id": "...", "question": "...", "golden_answers": ["..."], "metadata": {}}'


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its accepted answers; `metadata` is the set's own."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: dict[str, Any]


def read_passages(path: Path) -> Iterator[Passage]:
    """Yield the passages of a corpus file, in order: JSON lines, or DPR's table when its name ends in .tsv, maybe compressed.

    A title and a text become one contents the way FlashRAG writes it: the title in quotes, a line break, the text. A passage
    with an empty title is its text alone, which the validate stage counts as untitled.
    Raises DataError for a line that is not JSON or not UTF-8, a missing or blank field, and, at the end, repeated ids.
    """
    ids = _Ids()
    for where, row in _corpus_rows(path):
        passage = Passage(where.identifier(row), where.contents(row))
        ids.add(passage.id)
        yield passage
    if ids.repeated():
        _name_repeated(_corpus_rows(path), ids.repeated())


def read_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a file, in order: JSON lines, or parquet when its name ends so.

    Raises DataError as `read_passages`, and for a question without answers.
    """
    ids = _Ids()
    for where, row in _rows(path, _QUESTION_FORM):
        question = Question(where.identifier(row), where.text(row, "question"), where.answers(row), where.metadata(row))
        ids.add(question.id)
        yield question
    if ids.repeated():
        _name_repeated(_rows(path, _QUESTION_FORM), ids.repeated())


def to_line(row: Passage | Question) -> bytes:
    """Return the row as one line of UTF-8 JSON; the same bytes for the same row."""
    if isinstance(row, Passage):
        fields: dict[str, Any] = {"id": row.id, "contents": row.contents}
    else:
        fields = {"id": row.id, "question": row.question, "golden_answers": row.golden_answers, "metadata": row.metadata}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def supporting_ids(question: Question) -> list[str]:
    """Return the ids of the passages that support the answer; empty where the set does not say."""
    return list(_identifiers(question.metadata.get(_SUPPORT)) or ())


def _identifiers(value: Any) -> list[str] | None:
    """Return the ids that a list of strings and integers, or a single one, stands for; None for any other value."""
    values = cast(list[Any], value) if isinstance(value, list) else [] if value is None else [value]
    usable = all(isinstance(item, (str, int)) and not isinstance(item, bool) and str(item).strip() for item in values)
    return [str(item) for item in values] if usable else None


@dataclass(frozen=True, slots=True)
class _Where:
    """One line of one file: takes fields out of its row or says what is wrong with them."""

    path: Path
    number: int
    form: str

    def error(self, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.path}:{self.number}: {problem}; {remedy}; {self.form}")

    def decoded(self, line: bytes) -> str:
        try:
            # A byte order mark can stand at the beginning of the file only; anywhere else it is text.
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad = line[error.start : error.start + 4].hex(" ")
            raise self.error(f"byte {error.start} of the line ({bad}) is not UTF-8", "write the file anew as UTF-8") from None

    def fields(self, line: bytes) -> list[str]:
        """Return the fields of a table's line; none for a blank one."""
        text = self.decoded(line).rstrip("\r\n")
        try:
            return next(csv.reader((text,), delimiter="\t", strict=True), [])
        except csv.Error as error:
            # The csv module tells its errors apart by their words alone.
            if "new-line character" in str(error):
                problem, remedy = "a carriage return stands inside the row", "remove it or put its field in quotes"
            elif "unexpected end" in str(error):
                problem, remedy = (
                    f"a quoted field is not closed in {_show(text)}",
                    "close it in the same line, or double a quote that is text",
                )
            else:
                problem, remedy = f"text follows a closing quote in {_show(text)} ({error})", "quote the whole field and double its quotes"
            raise self.error(problem, remedy) from None

    def field(self, row: dict[str, Any], key: str) -> Any:
        if key not in row:
            raise self.error(f"the row has no {key!r}, only {sorted(row)}", f"add {key!r} or remove the line")
        return row[key]

    def identifier(self, row: dict[str, Any]) -> str:
        value = self.field(row, "id")
        # To Python `true` is an integer, too; it is no id.
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._filled(value, "id")

    def text(self, row: dict[str, Any], key: str) -> str:
        return self._filled(self.field(row, key), key)

    def contents(self, row: dict[str, Any]) -> str:
        # A row with neither is told that it lacks `contents`, FlashRAG's own name.
        if "contents" in row or "text" not in row:
            return self.text(row, "contents")
        title, text = self.field(row, "title"), self.text(row, "text")
        # A title that is neither empty nor text is refused by `text`.
        return text if title is None or not str(title).strip() else f'"{self.text(row, "title")}"\n{text}'

    def answers(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = self.field(row, "golden_answers")
        if not isinstance(value, list):
            raise self.error(f"golden_answers={_show(value)} is a {type(value).__name__}", "write a list of strings")
        if not value:
            raise self.error("golden_answers=[] holds no answer", "add at least one answer or remove the line")
        return tuple(self._filled(answer, "golden_answers") for answer in cast(list[Any], value))

    def metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        value = row.get("metadata")
        if value is not None and not isinstance(value, dict):
            raise self.error(f"metadata={_show(value)} is a {type(value).__name__}", "write an object or leave it out")
        metadata = cast(dict[str, Any], value or {})
        support = metadata.get(_SUPPORT)
        if _identifiers(support) is None:
            raise self.error(f"{_SUPPORT}={_show(support)} holds what is no id", "write a list of passage ids, strings or integers")
        return metadata

    def _filled(self, value: Any, key: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{key}={_show(value)} is a {type(value).__name__}", "write a string")
        if not value.strip():
            raise self.error(f"{key}={_show(value)} is blank", "fill it in or remove the line")
        # JSON may hold half a surrogate pair (`\ud800`), for which UTF-8 has no bytes. ASCII, the usual case, needs no trial.
        if not value.isascii():
            self._encodable(value, key)
        return value

    def _encodable(self, value: str, key: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{key} holds half a surrogate pair at character {error.start}", "write the file anew as UTF-8") from None


def _corpus_rows(path: Path) -> Iterator[tuple[_Where, dict[str, Any]]]:
    with open_plain(path) as (name, stream):
        yield from _table(path, stream) if name.endswith(".tsv") else _json_lines(path, stream, _CORPUS_FORM)


def _rows(path: Path, form: str) -> Iterator[tuple[_Where, dict[str, Any]]]:
    with open_plain(path) as (name, stream):
        yield from _columns(path, stream, form) if name.endswith(".parquet") else _json_lines(path, stream, form)


def _columns(path: Path, stream: BinaryIO, form: str) -> Iterator[tuple[_Where, dict[str, Any]]]:
    """Yield places (rows from 1) and rows of a parquet file in FlashRAG's columns, or verl's as Search-R1's scripts write them."""
    number = 0
    for number, row in enumerate(columns_file.rows(path, stream), 1):
        yield _Where(path, number, form), _question_row(row)
    if not number:
        raise DataError(f"{path} holds no row; at least one is needed; {form}")


def _question_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row under FlashRAG's names; what it has under them is taken first, verl's columns fill the gaps."""
    extra, source = row.get("extra_info") or {}, row.get("data_source") or "row"
    truth = (row.get("reward_model") or {}).get("ground_truth")
    target: Any = truth.get("target") if isinstance(truth, dict) else truth
    given = {name: row[name] for name in ("id", "question", "golden_answers") if row.get(name) is not None}
    filled: dict[str, Any] = {"id": extra.get("id") or f"{source}_{extra['index']}"} if "index" in extra else {}
    if target is not None:
        filled["golden_answers"] = [target] if isinstance(target, str) else target
    if question := extra.get("question") or _asked(row.get("prompt")):
        filled["question"] = question
    # A parquet struct gives every row all fields of all rows: what a row itself lacks is None.
    metadata = {name: value for name, value in (row.get("metadata") or {}).items() if value is not None} if _is_object(row) else {}
    if _SUPPORT not in metadata and extra.get(_SUPPORT):
        metadata[_SUPPORT] = extra[_SUPPORT]
    return {**filled, **given, "metadata": metadata}


def _is_object(row: dict[str, Any]) -> bool:
    return isinstance(row.get("metadata"), dict)


def _asked(prompt: Any) -> str | None:
    """Return the question of a chat prompt: what follows the last "Question:" of its last message, the end of Search-R1's template."""
    if not isinstance(prompt, list) or not prompt:
        return None
    message: Any = cast(list[Any], prompt)[-1]
    content = message.get("content") if isinstance(message, dict) else None
    return str(content).rpartition("Question:")[2].strip() if content else None


def _json_lines(path: Path, stream: BinaryIO, form: str) -> Iterator[tuple[_Where, dict[str, Any]]]:
    """Yield places (lines from 1) and rows; blank lines are skipped."""
    empty = True
    for number, line in enumerate(lines(path, stream), 1):
        if line.isspace():
            continue
        empty = False
        where = _Where(path, number, form)
        yield where, _parse(where, line)
    if empty:
        raise DataError(f"{path} holds no row; at least one is needed; {form}")


def _table(path: Path, stream: BinaryIO) -> Iterator[tuple[_Where, dict[str, Any]]]:
    """Yield places and rows of DPR's table, one row a line; a field in quotes may hold tabs and doubled quotes.

    A field cannot go on in the next line: an opening quote that is never closed would take up all rows to the next quote.
    """
    # The csv module's own limit of 128 KiB is below what a line may have.
    csv.field_size_limit(LONGEST_LINE)
    columns: list[str] | None = None
    rows = 0
    for number, line in enumerate(lines(path, stream), 1):
        where = _Where(path, number, _TABLE_FORM)
        fields = where.fields(line)
        if columns is None and fields:
            columns = fields
            if sorted(columns) != ["id", "text", "title"]:
                raise where.error(f"the columns are {_show(columns)}", "name them id, text and title")
        elif columns and fields:
            if len(fields) != len(columns):
                raise where.error(f"the row has {len(fields)} fields", "write three, quote those with tabs or quotes")
            rows += 1
            yield where, dict(zip(columns, fields, strict=True))
    if not rows:
        raise DataError(f"{path} holds no row; at least one is needed; {_TABLE_FORM}")


def _parse(where: _Where, line: bytes) -> dict[str, Any]:
    text = where.decoded(line)
    try:
        row = json.loads(text)
    # Brackets nested a thousand deep end in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise where.error(f"{_show(text.rstrip())} is not JSON ({error})", "write one JSON object a line") from None
    if not isinstance(row, dict):
        raise where.error(f"{_show(row)} is a {type(row).__name__}, not an object", "write one JSON object a line")
    return cast(dict[str, Any], row)


class _Ids:
    """Finds repeated ids with one 64-bit hash a row."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._repeated: frozenset[int] | None = None

    def add(self, identifier: str) -> None:
        # Differs from process to process and is never written down; `_name_repeated` compares the ids themselves.
        self._hashes.append(hash(identifier))

    def repeated(self) -> frozenset[int]:
        """Return the hashes that occur more than once; all but never a mere collision."""
        if self._repeated is None:
            values = np.frombuffer(self._hashes, dtype=np.int64) if self._hashes else np.empty(0, np.int64)
            ordered = np.sort(values)
            self._repeated = frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        return self._repeated


def _name_repeated(rows: Iterator[tuple[_Where, dict[str, Any]]], hashes: frozenset[int]) -> None:
    """Read again and raise for the first id that truly occurs twice; return when the hashes merely collided."""
    seen: dict[str, int] = {}
    for where, row in rows:
        identifier = str(row["id"])
        if hash(identifier) not in hashes:
            continue
        if identifier in seen:
            problem = f"id={_show(identifier)} was already used in line {seen[identifier]} ({len(hashes)} ids repeat)"
            raise where.error(problem, "give every row its own id")
        seen[identifier] = where.number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
