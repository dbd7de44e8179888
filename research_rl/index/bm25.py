"""BM25 over the terms of `words.terms`: Snowball stems without English stop words, scored as bm25s does. Knows text and rows.

Deviations from bm25s's own building: two passes over batches of text (count, then score), so that memory holds one
file's scores and the vocabulary, never the corpus; scores use the whole corpus's statistics, so that an index cut into
several files answers like one. The arrays are those of bm25s, searched by its code, under file names of our own: `Bm25.open`
opens them, `bm25s.BM25.load` does not, and a folder that `bm25s.BM25.save` wrote is no index of this kind. Arabic and Hindi words
have Snowball stemmers of their own; all others go through the English one, which leaves foreign letters as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer

from research_rl.config import IndexConfig
from research_rl.embedding import Vectors
from research_rl.errors import ManifestError
from research_rl.index.budget import ENGLISH, Terms
from research_rl.index.search import merged
from research_rl.pipeline import arrays
from research_rl.pipeline.stages import silent
from research_rl.pipeline.work import Work
from research_rl.reward.words import terms, unsegmented

__all__ = ["SAMPLE", "STOP_WORDS", "Bm25", "CorpusTexts", "build", "counted", "sampled", "write"]

STOP_WORDS = (
    *bm25s.tokenization.STOPWORDS_EN,
    *("what", "which", "who", "whom", "whose", "when", "where", "how", "why", "did", "does", "do"),
)
"""bm25s's English list and the words that make a question a question: they say nothing about its subject."""
_BATCH = 2000
SAMPLE = 2000
"""Passages of which the terms are counted beforehand."""
_BLOCKS = 20
"""Places of the corpus that they stand at."""
_LEAST_TERMS = 100
_GROWTH = (0.3, 0.8)
"""How a vocabulary grows: bounds of the exponent of Heaps' law, as a small or repetitive sample says little about it."""
_VOCABULARY = "bm25-vocabulary.json"
_TOKENS, _LENGTHS, _FREQUENCIES = "tokens.i32", "lengths.npy", "frequencies.npy"
_PARTS = ("data", "indices", "indptr")

Rows = npt.NDArray[np.int64]
Range = tuple[int, int]
Progress = Callable[[str, float], None]


class _Stems(dict[str, int]):
    """Numbers of words: equal for words with one stem, -1 for stop words. An unknown word gets the next number."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(STOP_WORDS, -1))
        self.numbers: dict[str, int] = {}
        self._stem = _stemmer()

    def __missing__(self, word: str) -> int:
        # Called for new words only; the others are looked up without a call of Python code.
        number = self[word] = self.numbers.setdefault(self._stem(word), len(self.numbers))
        return number


class CorpusTexts(Protocol):
    """Passages read in batches, as a `PassageStore` gives them."""

    def __len__(self) -> int: ...

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows `start` to `stop` - 1."""
        ...

    def batches(self, size: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the first row and the texts of consecutive batches."""
        ...


def write(texts: CorpusTexts, config: IndexConfig, folder: Path) -> None:
    """Write a word index in one file into `folder`."""
    _count(texts, silent, folder)
    _score(folder, config, 0, 0, len(texts), folder)


def build(work: Work, config: IndexConfig, store: CorpusTexts, ranges: Sequence[Range], progress: Progress) -> dict[str, Any]:
    """Build the word index as units of `work`; return the facts `Bm25.open` needs."""
    facts = work.unit("bm25-words", partial(_count, store, progress))
    for number, (start, stop) in enumerate(ranges):
        work.unit(unit(number), partial(_score, work.folder / "bm25-words", config, number, start, stop))
        progress(f"{stop:,} of {len(store):,} passages scored", 0.7 + 0.3 * stop / max(len(store), 1))
    work.unit("bm25-vocabulary", partial(_vocabulary, work.folder / "bm25-words"))
    return facts


def sampled(store: CorpusTexts) -> Terms:
    """Count the terms of passages spread over the corpus, see `counted`."""
    blocks = min(len(store), _BLOCKS)
    starts = [len(store) * block // blocks for block in range(blocks)]
    ends = [min(start + SAMPLE // _BLOCKS, end) for start, end in zip(starts, [*starts[1:], len(store)], strict=True)] if blocks else []
    return counted(text for start, end in zip(starts, ends, strict=True) for text in store.texts(start, end))


def counted(texts: Iterable[str]) -> Terms:
    """Count the terms of some passages, for the plan of memory and disk; those of English where there are next to none."""
    stems, seen = _Stems(), list[tuple[int, int]]()
    total = distinct = 0
    for text in texts:
        tokens, _ = _numbers(stems, [text])
        total, distinct = total + len(tokens), distinct + len(np.unique(tokens))
        seen.append((total, len(stems.numbers)))
    if total < _LEAST_TERMS:
        return ENGLISH
    words = len(stems.numbers)
    # Heaps' exponent is the slope, in logarithms, between the vocabularies at half and at all of the terms.
    half, fewer = next(item for item in seen if item[0] >= total / 2)
    # Where a single passage leads from below half to all of the terms there is no second point.
    growth = float(np.clip(np.log(words / fewer) / np.log(total / half), *_GROWTH)) if half < total else ENGLISH.growth
    return Terms(total / len(seen), distinct / total, words / total**growth, growth)


def unit(number: int) -> str:
    """Return the name of the unit of work that makes the files of a range of rows."""
    return f"bm25-{number:05d}"


def _count(store: CorpusTexts, progress: Progress, folder: Path) -> dict[str, Any]:
    """Write every passage's stems as numbers, and how many passages hold each stem."""
    stems, lengths = _Stems(), np.zeros(len(store), np.int32)
    frequencies = np.zeros(1 << 16, np.int64)
    with (folder / _TOKENS).open("wb") as stream:
        for start, texts in store.batches(_BATCH):
            tokens, counts = _numbers(stems, texts)
            arrays.append(stream, tokens)
            lengths[start : start + len(texts)] = counts
            # A passage counts once for each of its stems, however often it has it.
            pairs = np.unique(_pairs(tokens, counts))
            frequencies = _grown(frequencies, len(stems.numbers))
            frequencies += np.bincount(pairs & 0xFFFFFFFF, minlength=len(frequencies))
            progress(f"words of {start + len(texts):,} of {len(store):,} passages", 0.7 * (start + len(texts)) / max(len(store), 1))
    arrays.save(folder / _LENGTHS, lengths)
    arrays.save(folder / _FREQUENCIES, frequencies[: len(stems.numbers)])
    (folder / _VOCABULARY).write_text(json.dumps(stems.numbers, ensure_ascii=False), encoding="utf-8")
    return {"words": len(stems.numbers), "mean_length": float(lengths.mean()) if len(lengths) else 0.0}


def _numbers(stems: _Stems, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the stems of all texts in a row, and how many each text has."""
    number = stems.__getitem__
    numbered = [np.fromiter(map(number, _terms(text)), np.int32) for text in texts]
    # Stop words have the number -1.
    stems_of = [numbers[numbers >= 0] for numbers in numbered]
    return np.concatenate(stems_of), np.fromiter(map(len, stems_of), np.int32, len(stems_of))


def _terms(text: str) -> list[str]:
    """Return the terms that are indexed: single letters and digits only of scripts whose characters are words."""
    return [term for term in terms(text) if len(term) > 1 or unsegmented(term)]


def _stemmer() -> Callable[[str], str]:
    """Return the function from a word to its stem, by the script of the word's first letter."""
    english, arabic, hindi = (Stemmer.Stemmer(language).stemWord for language in ("english", "arabic", "hindi"))

    def stem(word: str) -> str:
        first = word[0]
        if "\u0600" <= first <= "\u06ff":
            return arabic(word)
        return hindi(word) if "\u0900" <= first <= "\u097f" else english(word)

    return stem


def _pairs(tokens: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Rows:
    """Return passage and stem of every token as one number, passage in the upper half."""
    return np.repeat(np.arange(len(counts), dtype=np.int64) << 32, counts) | tokens


def _grown(values: Rows, size: int) -> Rows:
    # At least doubled, so that growing takes constant time a word in all.
    return values if size <= len(values) else np.concatenate([values, np.zeros(max(size, 2 * len(values)) - len(values), np.int64)])


def _score(words: Path, config: IndexConfig, number: int, start: int, stop: int, folder: Path) -> dict[str, Any]:
    """Score rows `start` to `stop` - 1 against every stem they hold: Lucene's BM25, as bm25s's default."""
    lengths, frequencies = np.load(words / _LENGTHS), np.load(words / _FREQUENCIES)
    counts = lengths[start:stop]
    first = int(lengths[:start].sum(dtype=np.int64))
    tokens = np.fromfile(words / _TOKENS, np.int32, int(counts.sum(dtype=np.int64)), offset=4 * first)
    # Ordered by stem, then by row: the columns of the sparse matrix that bm25s searches.
    pairs, times = np.unique(_by_stem(tokens, counts), return_counts=True)
    stem, row = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
    idf = np.log(1 + (len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
    # Passages of stop words alone have a mean length of 0.
    longer = 1 - config.b + config.b * counts / max(lengths.mean(), 1e-9)
    tf = times.astype(np.float32)
    scores = (idf.astype(np.float32)[stem] * (tf / (config.k1 * longer[row] + tf))).astype(np.float32)
    starts = np.searchsorted(stem, np.arange(len(frequencies) + 1)).astype(np.int64)
    for part, values in zip(_PARTS, (scores, row, starts), strict=True):
        arrays.save(folder / _file(number, part), values)
    return {}


def _by_stem(tokens: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Rows:
    return (tokens.astype(np.int64) << 32) | np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _vocabulary(words: Path, folder: Path) -> dict[str, Any]:
    # A copy in a unit of its own, since the unit `bm25-words`, with every token of the corpus, is left out of the artifact.
    (folder / _VOCABULARY).write_bytes((words / _VOCABULARY).read_bytes())
    return {}


def _file(number: int, part: str) -> str:
    return f"bm25-{number:05d}-{part}.npy"


class Bm25:
    """Searches the word index of an index folder; the scores are memory-mapped."""

    def __init__(self, vocabulary: dict[str, int], parts: Sequence[tuple[bm25s.BM25, int]]) -> None:
        self._numbers, self._parts = vocabulary, parts
        self._stem = _stemmer()
        self._stop = frozenset(STOP_WORDS)
        self.rows: int = sum(int(part.scores["num_docs"]) for part, _ in parts)

    @classmethod
    def open(cls, folder: Path, ranges: Sequence[Range], numbers: Iterable[int]) -> Bm25:
        """Open the files `numbers`. Raises ManifestError."""
        try:
            vocabulary = json.loads((folder / _VOCABULARY).read_text(encoding="utf-8"))
            return cls(vocabulary, [(_load(folder, number, *ranges[number]), ranges[number][0]) for number in numbers])
        except (OSError, ValueError) as error:
            raise ManifestError(f"{folder} holds no word index ({error}); run the index stage again") from None

    def search(self, queries: Sequence[str], top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], k = min(top_k, rows), equal scores in row order.

        Row -1 where fewer passages share a word with the query.
        """
        k = min(top_k, self.rows)
        tokens = [self._tokens(query) for query in queries]
        hits = [[_best(part, start, numbers, k) for numbers in tokens] for part, start in self._parts]
        stacked = [(np.stack([s for s, _ in part]), np.stack([r for _, r in part])) for part in hits]
        return merged([scores for scores, _ in stacked], [rows for _, rows in stacked], k)

    def _tokens(self, query: str) -> list[int]:
        """Return the numbers of the query's known stems; a repeated word counts as often as it occurs, as in bm25s."""
        words = [term for term in _terms(query) if term not in self._stop]
        return [number for word in words if (number := self._numbers.get(self._stem(word))) is not None]


def _load(folder: Path, number: int, start: int, stop: int) -> bm25s.BM25:
    index = bm25s.BM25()
    data, indices, starts = (_file(number, part) for part in _PARTS)
    index.load_scores(folder, data, indices, starts, num_docs=stop - start, mmap=True)
    # Every search reads it, but only bm25s's own building and loading set it; this variant of BM25 has none.
    index.nonoccurrence_array = None
    # A slice of a memmap costs several times one of the plain array over the same pages.
    index.scores |= {part: np.asarray(index.scores[part]) for part in _PARTS}
    return index


def _best(index: bm25s.BM25, start: int, numbers: list[int], k: int) -> tuple[Vectors, Rows]:
    """Return the k best rows that hold any of the stems."""
    best, rows = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int64)
    if not numbers:
        return best, rows
    scores = index.get_scores_from_ids(numbers)
    # Above 0 in any case: a passage with none of the words is no hit.
    line = max(np.partition(scores, -k)[-k] if k < len(scores) else 0.0, np.finfo(np.float32).tiny)
    matching = np.flatnonzero(scores >= line)
    order = matching[np.lexsort((matching, -scores[matching]))][:k]
    best[: len(order)], rows[: len(order)] = scores[order], order + start
    return best, rows
