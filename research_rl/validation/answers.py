"""Seek answers and passage ids in a corpus in bulk. Knows keys of words; knows no file.

An answer is found where its words stand side by side in a passage, without regard to case and punctuation. Of an answer of
more than LONGEST words the first are sought; in scripts without spaces between words each character is a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from research_rl.validation.columns import Bits, RowWords, keys, phrase_keys, phrases

__all__ = ["Sought"]

LONGEST = 8
# No passage states these answers in words.
_CLOSED = frozenset({"yes", "no", "noanswer"})
_BITS = 20


@dataclass(frozen=True)
class Sought:
    """The answers and passage ids of all question sets, as sorted keys; small enough to hand to every process."""

    ids: Bits
    by_size: dict[int, tuple[Bits, npt.NDArray[np.int64]]]
    phrases: int
    slots: dict[str, int]

    @classmethod
    def of(cls, answers: Iterable[str], ids: Iterable[str]) -> Sought:
        """Prepare the search for the answers and for the passages named by `ids`."""
        texts = list(dict.fromkeys(answers))
        sizes = phrase_keys(texts, LONGEST)
        place: dict[tuple[int, int], int] = {}
        slots = {text: place.setdefault(key, len(place)) for text, key in zip(texts, sizes, strict=True) if key[0]}
        by_size: dict[int, tuple[Bits, npt.NDArray[np.int64]]] = {}
        for size in sorted({size for size, _ in place}):
            pairs = sorted((key, slot) for (words, key), slot in place.items() if words == size)
            by_size[size] = (np.array([key for key, _ in pairs], np.uint64), np.array([slot for _, slot in pairs], np.int64))
        return cls(np.unique(keys(pa.array(list(ids), pa.large_string()))), by_size, len(place), slots)

    def find(self, text: RowWords) -> npt.NDArray[np.bool_]:
        """Return a mask of the phrases that stand within a row of `text`."""
        present = np.zeros(self.phrases, dtype=bool)
        # Words left in the row from each word on: a phrase must end in the row in which it begins.
        rest = np.repeat(text.starts[1:], text.counts) - np.arange(len(text.keys))
        for size, (answers, slots) in self.by_size.items():
            present[slots[_among(phrases(text, size)[rest[: len(rest) - size + 1] >= size], answers)]] = True
        return present

    def known(self, ids: Bits) -> npt.NDArray[np.bool_]:
        """Return a mask of the sought passage ids that are among `ids`."""
        present = np.zeros(len(self.ids), dtype=bool)
        present[_among(ids, self.ids)] = True
        return present

    def answered(self, answers: Sequence[str], present: npt.NDArray[np.bool_]) -> bool:
        """Return whether one of the answers was found; yes and no count as found."""
        return any(
            answer.strip().lower().rstrip(".") in _CLOSED or ((slot := self.slots.get(answer)) is not None and bool(present[slot]))
            for answer in answers
        )

    def missing(self, ids: Sequence[str], known: npt.NDArray[np.bool_]) -> list[str]:
        """Return the ids that were not found."""
        if not ids:
            return []
        # All ids that are asked about were given to `of`, so each has its place.
        places = np.searchsorted(self.ids, keys(pa.array(ids, pa.large_string())))
        return [identifier for identifier, here in zip(ids, known[places], strict=True) if not here]


def _among(values: Bits, sought: Bits) -> npt.NDArray[np.int64]:
    """Return the places in `sought` (sorted, distinct) of the values that occur there; a bit table drops most others first."""
    if not len(sought):
        return np.empty(0, np.int64)
    table = np.zeros(1 << _BITS, dtype=bool)
    table[sought >> np.uint64(64 - _BITS)] = True
    likely = np.unique(values[table[values >> np.uint64(64 - _BITS)]])
    # A value above all others would have a place behind the end; at the last place it differs all the same.
    places = np.minimum(np.searchsorted(sought, likely), len(sought) - 1)
    return places[sought[places] == likely]
