"""Measure a corpus file, each byte once, in shards that any number of processes may share. Judges nothing.

Invariants: (1) memory does not grow with the corpus: the keys for the duplicate search, 16 bytes a row, go to a scratch
folder on disk; (2) the result depends on the file and the questions alone, not on the number of processes.
"""

from __future__ import annotations

import heapq
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from research_rl.pipeline import arrays
from research_rl.validation.answers import Sought
from research_rl.validation.columns import Bits, RowWords, encoding_defects, keys, words

__all__ = ["CorpusStatistics", "Example", "measure_corpus", "parse_lines", "repeated"]

pc: Any = import_module("pyarrow.compute")
"""Its functions are made when it is imported, where no type checker sees them."""

SHARD_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
SAMPLE_ROWS = 1_000
EXAMPLES = 5
SHOWN = 80
LONGEST = 1 << 16
"""Lengths are counted one by one up to here; longer texts count as this long in quantiles."""
PROCESSES = 8
_MERGED = 1 << 21
_FIELDS = pa.schema({"id": pa.large_string(), "contents": pa.large_string()})

Rows = Callable[[int], None]
"""Called with the number of rows read so far."""
Example = dict[str, Any]
"""An offending row: line (from 1), id, text (shortened)."""


@dataclass
class CorpusStatistics:
    """What one pass leaves of a byte range: counts, length histograms, a sample, examples of each defect, answers found."""

    rows: int = 0
    longest: int = 0
    defects: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, list[Example]] = field(default_factory=dict[str, list[Example]])
    sample: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    chars: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))
    words: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    known: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    shards: list[dict[str, int]] = field(default_factory=list[dict[str, int]])

    def share(self, defect: str) -> float:
        """Return the share of rows with a defect."""
        return self.defects.get(defect, 0) / max(1, self.rows)

    def note(self, defect: str, count: int, examples: Sequence[Example]) -> None:
        """Add `count` rows with a defect, of which `examples` are the first."""
        self.defects[defect] = self.defects.get(defect, 0) + count
        shown = self.examples.setdefault(defect, [])
        shown += examples[: EXAMPLES - len(shown)]

    def merge(self, other: CorpusStatistics) -> None:
        """Take in the range that follows this one; its line numbers begin at 1."""
        for defect, count in other.defects.items():
            moved = [{**example, "line": example["line"] + self.rows} for example in other.examples.get(defect, [])]
            self.note(defect, count, moved)
        self.rows += other.rows
        self.longest = max(self.longest, other.longest)
        # The rows with the smallest keys: chance enough for a sample, and the same rows however the file was cut.
        self.sample = heapq.nsmallest(SAMPLE_ROWS, self.sample + other.sample)
        self.chars, self.words = self.chars + other.chars, self.words + other.words
        self.present, self.known = self.present | other.present, self.known | other.known


@dataclass(frozen=True)
class _Keys:
    """Keys for the duplicate search, one of each a row; zero where the row has no text."""

    contents: Bits
    ids: Bits


def measure_corpus(path: Path, sought: Sought, max_chars: int, scratch: Path, seen: Rows) -> CorpusStatistics:
    """Read the corpus once. A malformed line is counted, not raised; duplicates are sought among all rows afterwards."""
    total = CorpusStatistics(present=np.zeros(sought.phrases, bool), known=np.zeros(len(sought.ids), bool))
    ranges = _ranges(path)
    scratch.mkdir(parents=True, exist_ok=True)
    spilled = {name: scratch / f"{name}.u64" for name in ("contents", "ids")}
    with spilled["contents"].open("wb") as contents, spilled["ids"].open("wb") as ids:
        for part, part_keys in _shards(path, ranges, sought, max_chars):
            total.merge(part)
            total.shards.append({"shard": len(total.shards), "rows": part.rows, "longest": part.longest, **part.defects})
            arrays.append(contents, part_keys.contents)
            arrays.append(ids, part_keys.ids)
            seen(total.rows)
    for defect, name in (("repeated_contents", "contents"), ("repeated_ids", "ids")):
        _note_repeated(total, defect, spilled[name], path, ranges)
        spilled[name].unlink()
    return total


def _ranges(path: Path) -> list[tuple[int, int]]:
    """Cut the file at line ends into pieces of about SHARD_BYTES."""
    size, cuts = path.stat().st_size, [0]
    with path.open("rb") as stream:
        while cuts[-1] + SHARD_BYTES < size:
            stream.seek(cuts[-1] + SHARD_BYTES)
            stream.readline()
            cuts.append(stream.tell())
    ends = [*cuts[1:], size]
    return [(start, stop) for start, stop in zip(cuts, ends, strict=True) if stop > start]


def _shards(path: Path, ranges: list[tuple[int, int]], sought: Sought, max_chars: int) -> Iterator[tuple[CorpusStatistics, _Keys]]:
    work = partial(measure_range, path, sought, max_chars)
    workers = min(len(os.sched_getaffinity(0)), len(ranges), PROCESSES)
    if workers < 2:
        yield from map(work, ranges)
        return
    with _pool(workers) as pool:
        # At most two ranges a worker are under way, so that results never pile up.
        pending = [pool.submit(work, item) for item in ranges[: 2 * workers]]
        for item in range(len(ranges)):
            yield pending.pop(0).result()
            if (ahead := item + 2 * workers) < len(ranges):
                pending.append(pool.submit(work, ranges[ahead]))


@contextmanager
def _pool(workers: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends."""
    # Not forked: a fork would copy the locks that Arrow's threads hold at that moment, and nobody would release the copies.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """End this process when its parent is gone; a pool's worker does not notice a parent that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        # `sys.exit` would end this thread alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure_range(path: Path, sought: Sought, max_chars: int, place: tuple[int, int]) -> tuple[CorpusStatistics, _Keys]:
    """Measure the lines of one byte range, block by block."""
    total = CorpusStatistics(present=np.zeros(sought.phrases, bool), known=np.zeros(len(sought.ids), bool))
    contents: list[Bits] = []
    ids: list[Bits] = []
    for block in _blocks(path, *place):
        part, part_keys = _measure(block, sought, max_chars)
        total.merge(part)
        contents.append(part_keys.contents)
        ids.append(part_keys.ids)
    return total, _Keys(np.concatenate(contents), np.concatenate(ids))


def _blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield whole lines in blocks; the last line gets its line end if it lacks one."""
    with path.open("rb") as stream:
        stream.seek(start)
        while stream.tell() < stop:
            block = stream.read(min(BLOCK_BYTES, stop - stream.tell()))
            if not block.endswith(b"\n"):
                block += stream.readline()
            yield block if block.endswith(b"\n") else block + b"\n"


def parse_lines(block: bytes) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
    """Return ids, contents and a mask of malformed lines, one row a line; malformed rows have empty fields."""
    table = _parse_whole(block)
    if table is None:
        rows = [_parse(line) for line in block.split(b"\n")[:-1]]
        bad = np.array([row is None for row in rows], dtype=bool)
        columns = zip(*(row or ("", "") for row in rows), strict=True)
        ids, contents = (pa.array(column, pa.large_string()) for column in columns)
        return ids, contents, bad
    return table.column("id").chunk(0), table.column("contents").chunk(0), np.zeros(len(table), dtype=bool)


def _parse_whole(block: bytes) -> Any:
    """Parse a block at once, or return None when a line of it is not as it should be."""
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=_FIELDS, unexpected_field_behavior="ignore"),
        ).combine_chunks()
        # The reader does not look whether strings are UTF-8; this does.
        table.validate(full=True)
    except pa.ArrowInvalid:
        return None
    # Fewer rows than lines: a line was blank, or an object went over several.
    whole = len(table) == block.count(b"\n") and all(
        column.null_count == 0 and not pc.any(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py()
        for column in table.columns
    )
    return table if whole else None


def _parse(line: bytes) -> tuple[str, str] | None:
    try:
        row = json.loads(line)
        identifier, contents = row["id"], row["contents"]
        if not (isinstance(identifier, str) and identifier.strip() and isinstance(contents, str) and contents.strip()):
            return None
        for text in (identifier, contents):
            # json lets half a surrogate pair pass, which has no bytes in UTF-8.
            text.encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return identifier, contents


def _measure(block: bytes, sought: Sought, max_chars: int) -> tuple[CorpusStatistics, _Keys]:
    ids, contents, malformed = parse_lines(block)
    chars, known_words = pc.utf8_length(contents).to_numpy(zero_copy_only=False), words(contents)
    id_keys, content_keys = keys(ids), known_words.row_keys()
    part = CorpusStatistics(rows=len(ids), longest=int(chars.max(initial=0)))
    part.chars, part.words = _histogram(chars), _histogram(known_words.counts)
    masks = {"malformed": malformed, **_defects(contents, chars, known_words, max_chars)}
    for defect, mask in masks.items():
        # A malformed row has empty fields, which would count as a defect of its text once more.
        places = np.flatnonzero(mask if defect == "malformed" else mask & ~malformed)
        part.note(defect, len(places), [_example(int(row), ids, contents, block) for row in places[:EXAMPLES]])
    part.present, part.known = sought.find(known_words), sought.known(id_keys)
    lowest = np.argsort(content_keys, kind="stable")[:SAMPLE_ROWS]
    part.sample = [(int(content_keys[row]), ids[int(row)].as_py(), contents[int(row)].as_py()) for row in lowest if not malformed[row]]
    # Zero takes part in no comparison: rows without an id do not repeat each other.
    id_keys[malformed] = 0
    return part, _Keys(content_keys, id_keys)


def _histogram(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)


def _defects(contents: Any, chars: npt.NDArray[np.int64], known: RowWords, max_chars: int) -> dict[str, npt.NDArray[np.bool_]]:
    titled = pc.match_substring(pc.utf8_trim_whitespace(contents), "\n").to_numpy(zero_copy_only=False)
    return {**encoding_defects(contents), "untitled": ~titled, "wordless": known.counts == 0, "overlong": chars > max_chars}


def _example(row: int, ids: Any, contents: Any, block: bytes) -> Example:
    # A malformed row has no contents: its line is shown as it stands in the file.
    text = contents[row].as_py() or block.split(b"\n", row + 1)[row].decode(errors="replace")
    return {"line": row + 1, "id": ids[row].as_py(), "text": shorten(text)}


def shorten(text: str) -> str:
    """Return the text on one line of at most SHOWN characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _note_repeated(total: CorpusStatistics, defect: str, spilled: Path, path: Path, ranges: list[tuple[int, int]]) -> None:
    count, first = repeated(spilled)
    total.note(defect, count, [_repeat(later, earlier, path, ranges, total.shards) for later, earlier in first])


def repeated(spilled: Path) -> tuple[int, list[tuple[int, int]]]:
    """Return how many keys of a file occurred before, and the first such rows with the row each repeats.

    A file too large for memory is read several times, each time for a part of the key space.
    """
    size = spilled.stat().st_size // 8
    # By remainder of the key, so that equal keys are in one part.
    parts = max(1, -(-size // _MERGED))
    count, first = 0, list[tuple[int, int]]()
    for part in range(parts):
        values, rows = _select(spilled, part, parts)
        order = np.argsort(values, kind="stable")
        again = np.flatnonzero(values[order][1:] == values[order][:-1]) + 1
        count += len(again)
        # `order` is stable, so the row before a repeated one is an earlier row.
        pairs = sorted(zip(rows[order[again]].tolist(), rows[order[again - 1]].tolist(), strict=True))
        first = sorted(first + pairs[:EXAMPLES])[:EXAMPLES]
    return count, first


def _select(spilled: Path, part: int, parts: int) -> tuple[Bits, npt.NDArray[np.int64]]:
    values: list[Bits] = []
    rows: list[npt.NDArray[np.int64]] = []
    start = 0
    with spilled.open("rb") as stream:
        while len(block := np.fromfile(stream, np.uint64, 1 << 18)):
            places = np.flatnonzero(block % np.uint64(parts) == part)
            places = places[block[places] != 0]  # zero is the key of a row without text, which repeats nothing
            values.append(block[places])
            rows.append(places + start)
            start += len(block)
    return np.concatenate([np.empty(0, np.uint64), *values]), np.concatenate([np.empty(0, np.int64), *rows])


def _repeat(later: int, earlier: int, path: Path, ranges: list[tuple[int, int]], shards: list[dict[str, int]]) -> Example:
    """Read a repeated row again to show it."""
    ends = np.cumsum([shard["rows"] for shard in shards])
    shard = int(np.searchsorted(ends, later, side="right"))
    with path.open("rb") as stream:
        stream.seek(ranges[shard][0])
        for _ in range(later - int(ends[shard]) + shards[shard]["rows"]):
            stream.readline()
        identifier, contents = _parse(stream.readline()) or ("", "")
    return {"line": later + 1, "id": identifier, "text": f"repeats line {earlier + 1}: {shorten(contents)}"}
