"""Make text from data safe to print. Knows Unicode's control characters; knows no verb.

Questions, passages, model output and file names are untrusted: an escape sequence in one of them could move the cursor, change
the window's title or, with some terminals, type a command. A bidirectional control could show a text in another order.
"""

from __future__ import annotations

import sys
import unicodedata
from io import TextIOWrapper

__all__ = ["printable", "take_any_text"]

_KEEP = frozenset("\n\t")
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def take_any_text() -> None:
    """Let standard output write what its encoding has no character for as an escape; Python lets standard error do so anyway."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return `text` with every control character, lone surrogate and bidirectional control written as an escape such as \\x1b.

    Line feeds and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) if _is_unsafe(character) else character for character in text)


def _is_unsafe(character: str) -> bool:
    return character not in _KEEP and (unicodedata.category(character) in _HIDDEN or character in _BIDIRECTIONAL)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
