"""The words of a text in any script: the one tokenizer of metrics, validation, the lexical encoder and BM25.

Two forms, equal for scripts that put spaces between words: a word is a run of letters, digits, marks and underscores. Chinese,
Japanese, Thai, Lao, Khmer and Burmese put none, and where their words end is not written. There `words` gives single
characters, which can be counted and compared in order, and `terms` gives overlapping character n-grams, which can be searched
for (as Lucene's CJK analyzer does). A character is a letter with the marks that belong to it. Text in ASCII alone is lower-cased
and split by `\\w+`, and by nothing else.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

__all__ = ["INVISIBLE", "UNSEGMENTED", "characters", "marks", "terms", "unsegmented", "words"]

# Han with its radicals, iteration marks and extensions; kana with bopomofo; both with their half-width and compatibility forms.
_IDEOGRAPHS = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3105-\u312f\u31a0-\u31bf\uff66-\uff9f"
_THAI_LAO = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"
_BURMESE_KHMER = "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f\u1780-\u17d3\u17d7\u17dc"
_SOUTH_EAST_ASIAN = _THAI_LAO + _BURMESE_KHMER
_HANGUL = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"

UNSEGMENTED = _IDEOGRAPHS + _KANA + _SOUTH_EAST_ASIAN
"""Letters of the scripts without spaces between words, as the inside of a character class of a regular expression."""

INVISIBLE = "\u00ad\u0640\u064b-\u0652\u0670\u200c\u200d\u2060\ufeff"
"""Characters that only shape a word, as above: zero-width joiners, the soft hyphen, the Arabic vowel signs and lengthening stroke."""

# Lengths of the n-grams of `terms`.
_SIZES = {"cjk": (1, 2), "south_east_asian": (2, 3)}
_WORD = re.compile(r"\w+")
_ANY = re.compile(f"[{UNSEGMENTED}]")
_UNSEEN = re.compile(f"[{INVISIBLE}]")


def words(text: str) -> list[str]:
    """Return the words of a text in order and in lower case; of a script without spaces its single characters."""
    # The same words as the patterns below give, at a fraction of the time; most texts of an English corpus end here.
    if text.isascii():
        return _WORD.findall(text.lower())
    return _patterns().words.findall(_plain(text))


def terms(text: str) -> list[str]:
    """Return what a search index should hold of a text, in lower case: its words; of a script without spaces n-grams.

    Chinese, Japanese and Korean give single characters and pairs; Thai, Lao, Khmer and Burmese pairs and triples, because their
    single letters say little. Korean has spaces, but joins particles to its words.
    """
    if text.isascii():
        return _WORD.findall(text.lower())
    result: list[str] = []
    for run in _patterns().runs.finditer(_plain(text)):
        sizes = _SIZES.get(run.lastgroup or "")
        result += _ngrams(characters(run[0]), sizes) if sizes else [run[0]]
    return result


def unsegmented(text: str) -> bool:
    """Return whether a text holds a letter of a script without spaces between words."""
    return not text.isascii() and _ANY.search(text) is not None


def characters(text: str) -> list[str]:
    """Return the characters of a text, each with the marks that follow it."""
    return _patterns().characters.findall(text)


def _ngrams(run: list[str], sizes: tuple[int, ...]) -> list[str]:
    # A single letter still has to be findable.
    if len(run) < sizes[0]:
        return ["".join(run)]
    return ["".join(run[start : start + size]) for size in sizes for start in range(len(run) - size + 1)]


def _plain(text: str) -> str:
    """Return a text in lower case, in compatibility form (NFKC), without signs that only shape a word."""
    return unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).lower()


@lru_cache(1)
def marks() -> str:
    """Return all combining marks, as the inside of a character class; `\\w` leaves them out, which cuts Hindi words apart."""
    # All combining marks lie between these bounds but the variation selectors, which the end of the return value adds.
    codes = [code for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M"]
    starts = [code for code in codes if unicodedata.category(chr(code - 1))[0] != "M"]
    ends = [code for code in codes if unicodedata.category(chr(code + 1))[0] != "M"]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True)) + "\U000e0100-\U000e01ef"


class _Patterns(NamedTuple):
    words: re.Pattern[str]
    runs: re.Pattern[str]
    characters: re.Pattern[str]


@lru_cache(1)
def _patterns() -> _Patterns:
    """Compile the patterns at the first text beyond ASCII, which many runs never see."""

    # A word goes on over marks, which `\w` does not match.
    def word(without: str) -> str:
        return f"[^\\W{without}]+(?:[{marks()}]+[^\\W{without}]*)*"

    def run(name: str, letters: str) -> str:
        return f"(?P<{name}>(?:[{letters}][{marks()}]*)+)"

    cjk = _IDEOGRAPHS + _KANA + _HANGUL
    return _Patterns(
        words=re.compile(f"[{UNSEGMENTED}][{marks()}]*|{word(UNSEGMENTED)}"),
        runs=re.compile("|".join([run("cjk", cjk), run("south_east_asian", _SOUTH_EAST_ASIAN), word(UNSEGMENTED + _HANGUL)])),
        characters=re.compile(f"[\\s\\S][{marks()}]*"),
    )
