"""Measure a column of texts in bulk: words, lengths, defects of encoding, keys. Knows arrays; knows no file, no limit.

Texts are handled as one buffer of bytes with row offsets, so that the cost is per byte and not per Python object.
A word is a run of letters, digits, marks or underscores, or one character of a script without spaces between words, as in
`words.words`; words compare without case and in one Unicode normal form.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from research_rl.reward.words import INVISIBLE, UNSEGMENTED

__all__ = ["ENCODING_DEFECTS", "Bits", "RowWords", "encoding_defects", "keys", "phrase_keys", "phrases", "words"]

pc: Any = import_module("pyarrow.compute")
"""Its functions are made when it is imported, where no type checker sees them."""

Bits = npt.NDArray[np.uint64]

ENCODING_DEFECTS = {
    "replacement": "holds U+FFFD, the mark of an undecodable byte",
    "control": "holds control characters other than tab and line end",
    "mojibake": "holds UTF-8 that was read as Latin-1 or Windows-1252",
    "unnormalised": "differs from its Unicode normal form C",
}
# The second character of a doubly encoded letter lies in U+0080-00BF, or is what Windows-1252 shows for 0x80-0x9F.
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = f"[ÂÃ][\\x{{80}}-\\x{{bf}}{_CP1252}]|â(€|\\x{{80}})[\\x{{80}}-\\x{{bf}}{_CP1252}]|ï»¿"
# Without U+0085, which is a line end.
_C1 = r"[\x{80}-\x{84}\x{86}-\x{9f}]"
_NO_WORD = r"[^\pL\pN\pM_]+"

# Odd numbers with bits well spread, of the golden ratio and of xxHash: multiplied modulo 2^64 no two values become one.
_A, _B, _C = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
# Masks of the first 0 to 8 bytes, which are the low ones on a little-endian machine.
_HEAD = np.array([(1 << 8 * size) - 1 for size in range(8)] + [2**64 - 1], dtype=np.uint64)
_BREAKS = bytes(code for code in range(128) if not (chr(code).isalnum() or chr(code) == "_"))
# One pass lowers the letters and makes a space of all else that is ASCII; bytes above 127 belong to other letters and stay.
_SPACED = bytes.maketrans(_BREAKS + bytes(range(65, 91)), b" " * len(_BREAKS) + bytes(range(97, 123)))


@dataclass(frozen=True)
class RowWords:
    """The words of all rows in order: a 64-bit key each, and where each row's words start (rows + 1 entries)."""

    keys: Bits
    starts: npt.NDArray[np.int64]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Words per row."""
        return np.diff(self.starts)

    def row_keys(self) -> Bits:
        """Return one key a row; rows with the same words in the same order have the same key."""
        places = np.arange(len(self.keys), dtype=np.int64) - np.repeat(self.starts[:-1], self.counts)
        # The sums wrap around at 2^64 and so do their differences: each row's own sum is right all the same.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.keys * _powers(places))])
        return _mixed((sums[self.starts[1:]] - sums[self.starts[:-1]]) ^ self.counts.astype(np.uint64) * _B)


def words(texts: Any) -> RowWords:
    """Return the words of a string array without nulls; different words all but never share a key."""
    # With a space behind each row, so that no word goes on into the next one.
    # Made here: pyarrow imports pandas for its first scalar, which takes a second or two of every process that imports this module.
    empty, space = (pa.scalar(text, pa.large_string()) for text in ("", " "))
    lowered = pc.binary_join_element_wise(_plain(texts), empty, space)
    offsets, raw = _buffer(lowered)
    # A space in front as well, so that the first word begins behind one like all others.
    spaced = b" " + raw.translate(_SPACED)
    gaps = np.frombuffer(spaced, np.uint8) == 32
    begins = np.flatnonzero(gaps[:-1] & ~gaps[1:])
    ends = np.flatnonzero(~gaps[:-1] & gaps[1:])
    return RowWords(_keys_of(spaced[1:], begins, ends - begins), np.searchsorted(begins, offsets))


def _plain(texts: Any) -> Any:
    """Lower the rows that are not ASCII and put spaces between their words; ASCII rows are cheaper by the byte."""
    foreign = _foreign(texts)
    if not foreign.any():
        return texts
    visible = pc.replace_substring_regex(texts.filter(pa.array(foreign)), f"[{INVISIBLE}]", "")
    # The normal form only has to be the same everywhere; pyarrow has the decomposed one.
    lowered = pc.utf8_lower(pc.utf8_normalize(visible, "NFKD"))
    split = pc.replace_substring_regex(lowered, _NO_WORD, " ")
    # An accent that stands by itself, as in Xi´an, becomes a space and a mark, and no word begins with a mark.
    split = pc.replace_substring_regex(split, r"(^| )\pM+", " ")
    if pc.any(pc.match_substring_regex(split, f"[{UNSEGMENTED}]")).as_py():
        split = pc.replace_substring_regex(split, f"[{UNSEGMENTED}]\\pM*", r" \0 ")
    return pc.replace_with_mask(texts, pa.array(foreign), split)


def _foreign(texts: Any) -> npt.NDArray[np.bool_]:
    return pc.not_equal(pc.binary_length(texts), pc.utf8_length(texts)).to_numpy(zero_copy_only=False)


def encoding_defects(texts: Any) -> dict[str, npt.NDArray[np.bool_]]:
    """Return a mask a defect over the rows of a string array without nulls."""
    masks = {name: np.zeros(len(texts), dtype=bool) for name in ENCODING_DEFECTS}
    offsets, raw = _buffer(texts)
    codes = np.frombuffer(raw, np.uint8)
    bad = np.flatnonzero((codes < 32) & (codes != 9) & (codes != 10) & (codes != 13) | (codes == 127))
    masks["control"][np.searchsorted(offsets, bad, side="right") - 1] = True
    foreign = np.flatnonzero(_foreign(texts))
    if len(foreign):
        part = texts.take(pa.array(foreign))
        masks["replacement"][foreign] = _mask(pc.match_substring(part, "\ufffd"))
        masks["control"][foreign] |= _mask(pc.match_substring_regex(part, _C1))
        masks["mojibake"][foreign] = _mask(pc.match_substring_regex(part, _MOJIBAKE))
        # pyarrow's utf8_normalize decomposes whatever form is asked for.
        masks["unnormalised"][foreign] = [not unicodedata.is_normalized("NFC", text) for text in part.to_pylist()]
    return masks


def _mask(values: Any) -> npt.NDArray[np.bool_]:
    return values.to_numpy(zero_copy_only=False)


def keys(texts: Any) -> Bits:
    """Return a 64-bit key a row, 0 for an empty text alone; different texts all but never share one."""
    offsets, raw = _buffer(texts)
    sizes = np.diff(offsets)
    return _keys_of(raw, offsets[:-1], sizes)


def phrases(text: RowWords, size: int) -> Bits:
    """Return a key for the `size` words that begin at each word, without regard to rows."""
    total = max(0, len(text.keys) - size + 1)
    key = np.full(total, np.uint64(size), dtype=np.uint64)
    for place in range(size):
        key = key * _C + text.keys[place : place + total]
    return _mixed(key)


def phrase_keys(texts: Sequence[str], longest: int) -> list[tuple[int, int]]:
    """Return (words, key) a text, its first `longest` words taken; (0, 0) for a text without words."""
    known = words(pa.array(texts, pa.large_string()))
    sizes = np.minimum(known.counts, longest)
    result = [(0, 0)] * len(texts)
    for size in range(1, longest + 1):
        key = phrases(known, size)
        for row in np.flatnonzero(sizes == size):
            result[row] = (size, int(key[known.starts[row]]))
    return result


def _buffer(texts: Any) -> tuple[npt.NDArray[np.int64], bytes]:
    """Return row offsets (from 0) and the bytes of a large_string array."""
    _, offsets, data = texts.buffers()
    # A slice shares the buffers of the array that it was cut from.
    places = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    raw = data[int(places[0]) : int(places[-1])].to_pybytes() if data is not None else b""
    return places - places[0], raw


def _keys_of(raw: bytes, begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Bits:
    """Return keys of pieces of `raw`, 0 for an empty piece: of all their bytes."""
    result = _ends_keys(raw, begins, sizes)
    # Both ends tell all shorter pieces apart; longer words are rare and may be hashed one by one.
    for piece in np.flatnonzero(sizes > 16):
        digest = hashlib.blake2b(raw[begins[piece] : begins[piece] + sizes[piece]], digest_size=8).digest()
        result[piece] = int.from_bytes(digest, "little")
    return result


def _ends_keys(raw: bytes, begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Bits:
    """Return keys of pieces of `raw` made from their first 8 and last 8 bytes and their size: all there is of 16 bytes."""
    # Bytes to spare, so that the last piece can be read as eight as well.
    padded = np.frombuffer(raw + bytes(8), np.uint8)
    eights = _eights(padded)
    result = (eights[begins] & _HEAD[np.minimum(sizes, 8)]) * _A ^ sizes.astype(np.uint64) * _C
    long = np.flatnonzero(sizes > 8)
    result[long] ^= eights[begins[long] + sizes[long] - 8] * _B
    return _mixed(result)


def _eights(padded: npt.NDArray[np.uint8]) -> Any:
    """View every 8 consecutive bytes as one number, overlapping."""
    return np.ndarray((len(padded) - 7,), np.uint64, padded.data, 0, (1,))


def _mixed(values: Bits) -> Bits:
    """Spread all bits, one to one."""
    values = (values ^ (values >> np.uint64(32))) * _A
    return values ^ (values >> np.uint64(29))


def _powers(places: npt.NDArray[np.int64]) -> Bits:
    table = np.cumprod(np.full(int(places.max(initial=0)) + 1, _C))
    return table[places]
