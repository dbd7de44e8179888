"""Measure question sets and the corpus, reading each row once. Knows rows that `flashrag` already found well-formed; judges nothing.

Invariant: memory is flat in the text. The corpus costs 8 bytes a passage, a sample, and the supporting passages of the
held-out questions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from research_rl.data.flashrag import Question, read_passages, supporting_ids
from research_rl.trajectory import Passage

__all__ = ["CorpusStatistics", "answered", "measure_corpus", "repeated", "squeeze"]

SHARD_ROWS = 50_000
SAMPLE_ROWS = 1_000
EXAMPLES = 5
REPLACEMENT = "\ufffd"
_CLOSED = frozenset({"yes", "no", "noanswer"})
_WORDS = re.compile(r"\w+")

Rows = Callable[[int], None]
"""Called with the number of rows read so far."""


@dataclass
class CorpusStatistics:
    """What one pass leaves: a row per shard, a sample, the passages asked for, and examples of each defect."""

    rows: int = 0
    longest: int = 0
    repeated_contents: int = 0
    shards: list[dict[str, int]] = field(default_factory=list[dict[str, int]])
    sample: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def note(self, defect: str, example: str) -> None:
        """Remember `example` of `defect` unless there are enough."""
        known = self.examples.setdefault(defect, [])
        if len(known) < EXAMPLES:
            known.append(example)


def measure_corpus(path: Path, keep: Iterable[str], max_chars: int, seen: Rows) -> CorpusStatistics:
    """Stream the corpus once; `keep` names the passages whose contents are kept. Raises DataError for a malformed line."""
    found, wanted = CorpusStatistics(), frozenset(keep)
    blocks: list[np.ndarray] = []
    digests: list[bytes] = []
    for passage in read_passages(path):
        digests.append(_digest(passage.contents))
        _measure(found, passage, max_chars)
        if passage.id in wanted:
            found.kept[passage.id] = passage.contents
        if found.rows % SHARD_ROWS == 0:
            blocks.append(np.frombuffer(b"".join(digests), dtype=np.uint64))
            digests.clear()
            seen(found.rows)
    blocks.append(np.frombuffer(b"".join(digests), dtype=np.uint64))
    _note_repeated(np.concatenate(blocks), found)
    return found


def _measure(found: CorpusStatistics, passage: Passage, max_chars: int) -> None:
    if found.rows % SHARD_ROWS == 0:
        found.shards.append({"shard": len(found.shards), "rows": 0, "replacement": 0, "untitled": 0, "longest": 0})
    _draw(found, passage)
    found.rows += 1
    shard, length = found.shards[-1], len(passage.contents)
    shard["rows"] += 1
    shard["longest"], found.longest = max(shard["longest"], length), max(found.longest, length)
    if length > max_chars:
        found.note("longest", f"{passage.id} ({length} characters)")
    for defect, holds in (("replacement", REPLACEMENT in passage.contents), ("untitled", "\n" not in passage.contents.strip())):
        if holds:
            shard[defect] += 1
            found.note(defect, passage.id)


def _draw(found: CorpusStatistics, passage: Passage) -> None:
    """Keep a uniform sample (reservoir), drawn by the row number alone so that equal corpora give equal samples."""
    row = {"id": passage.id, "contents": passage.contents}
    if len(found.sample) < SAMPLE_ROWS:
        found.sample.append(row)
    elif (slot := int.from_bytes(_digest(str(found.rows)), "big") % (found.rows + 1)) < SAMPLE_ROWS:
        found.sample[slot] = row


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _note_repeated(digests: np.ndarray, found: CorpusStatistics) -> None:
    """Count passages whose contents occurred before; 64 bits give one false pair in 80,000 corpora of 21 million passages."""
    again = repeated(digests)
    found.repeated_contents = int(again.sum())
    for row in np.flatnonzero(again)[:EXAMPLES]:
        first = int(np.flatnonzero(digests == digests[row])[0])
        found.note("repeated_contents", f"row {int(row) + 1} repeats row {first + 1}")


def repeated(values: np.ndarray) -> np.ndarray:
    """Return a mask of the rows whose value occurs in an earlier row."""
    again = np.ones(len(values), dtype=bool)
    again[np.unique(values, return_index=True)[1]] = False
    return again


def squeeze(text: str) -> str:
    """Lower-case words separated and enclosed by single spaces, so that `in` matches whole words."""
    return f" {' '.join(_WORDS.findall(text.lower()))} "


def answered(questions: Sequence[Question], kept: dict[str, str], corpus: Path, seen: Rows) -> list[bool]:
    """Tell for each question whether a gold answer stands somewhere in the corpus; yes and no count as found.

    Supporting passages are looked at first. What they leave open costs a second pass, in which a passage is compared
    only with the answers whose longest word it holds.
    """
    found = [_supported(question, kept) for question in questions]
    left = {row: [squeeze(answer) for answer in questions[row].golden_answers] for row, hit in enumerate(found) if not hit}
    if left:
        for row in _scan(left, corpus, seen):
            found[row] = True
    return found


def _supported(question: Question, kept: dict[str, str]) -> bool:
    answers = [squeeze(answer) for answer in question.golden_answers]
    if any(answer.strip() in _CLOSED for answer in answers):
        return True
    passages = [squeeze(kept[passage]) for passage in supporting_ids(question) if passage in kept]
    return any(answer.strip() and answer in passage for answer in answers for passage in passages)


def _scan(left: dict[int, list[str]], corpus: Path, seen: Rows) -> set[int]:
    by_word: dict[str, list[tuple[str, int]]] = {}
    for row, answers in left.items():
        for answer in filter(str.strip, answers):
            by_word.setdefault(max(answer.split(), key=len), []).append((answer, row))
    found: set[int] = set()
    for number, passage in enumerate(read_passages(corpus), 1):
        text = squeeze(passage.contents)
        for word in by_word.keys() & set(text.split()):
            found.update(row for answer, row in by_word[word] if row not in found and answer in text)
        if number % SHARD_ROWS == 0:
            seen(number)
    return found
