"""The space of fictional names. Knows words and pairs; knows no facts, no questions.

A name is two invented words drawn from two lists of its kind. A hash assigns each name either to encyclopedias or to the warm-up's
traces, so the two can share words but never a name.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from functools import cache
from itertools import count, product

__all__ = ["Kind", "Side", "alias", "all_words", "names", "side", "words"]

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "tr", "st")
_VOWELS = ("a", "e", "i", "o", "u")
# The empty coda stands twice: a third of the syllables end in their vowel.
_CODAS = ("", "", "l", "n", "r", "s")


class Kind(StrEnum):
    """What an entity is."""

    PERSON = "person"
    WORK = "work"
    PLACE = "place"
    ORGANISATION = "organisation"


class Side(StrEnum):
    """The two halves of the name space."""

    ENCYCLOPEDIA = "encyclopedia"
    WARMUP = "warmup"


_KINDS = tuple(Kind)
_LISTS = 2 * len(_KINDS)
_ALIASES = {Kind.PERSON: "Old {}", Kind.WORK: "The {} Book", Kind.PLACE: "{} City", Kind.ORGANISATION: "{} House"}


def side(name: str) -> Side:
    """Return the half of the name space that `name` belongs to."""
    # By a digest: `hash` gives another half in every process.
    return tuple(Side)[hashlib.sha256(name.encode()).digest()[0] & 1]


@cache
def words(kind: Kind, position: int, number: int) -> tuple[str, ...]:
    """Return the first `number` invented words for position 0 or 1 of names of `kind`; a longer list extends a shorter one."""
    offset = 2 * _KINDS.index(kind) + position
    # Dealt in turn and not cut in blocks, so that a longer sequence only lengthens each list.
    return _invented(number * _LISTS)[offset::_LISTS]


def all_words(number: int) -> tuple[str, ...]:
    """Return every word that names with `number` words a list can hold."""
    return _invented(number * _LISTS)


@cache
def names(kind: Kind, half: Side, number: int) -> tuple[str, ...]:
    """Return all names of `kind` in one half of the space, with `number` words a list (about number² / 2 names)."""
    pairs = product(words(kind, 0, number), words(kind, 1, number))
    return tuple(name for name in map(" ".join, pairs) if side(name) is half)


def alias(kind: Kind, name: str) -> str:
    """Return the other name under which an entity may be known."""
    return _ALIASES[kind].format(name.split()[1])


@cache
def _invented(number: int) -> tuple[str, ...]:
    """Return `number` distinct two-syllable words; the sequence is fixed, so a longer one begins with a shorter one."""
    invented: dict[str, None] = {}
    for index in count():
        if len(invented) == number:
            return tuple(invented)
        invented.setdefault(_word(hashlib.sha256(str(index).encode()).digest()))
    raise AssertionError("unreachable")


def _word(digest: bytes) -> str:
    syllables = (
        _ONSETS[digest[at] % len(_ONSETS)] + _VOWELS[digest[at + 1] % len(_VOWELS)] + _CODAS[digest[at + 2] % len(_CODAS)] for at in (0, 3)
    )
    return "".join(syllables).capitalize()
