"""Print and log text of which a part comes from data. Knows Unicode's control characters; knows no verb.

Questions, passages, model output and file names are untrusted: an escape sequence in one of them could move the cursor, change
the window's title or, with some terminals, type a command. A bidirectional control could show a text in another order.

Invariant: flows, tasks and commands print through `say` and `say_json` alone, which a test holds them to.
"""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from io import TextIOWrapper
from typing import Any, TextIO

__all__ = ["guard_logs", "printable", "say", "say_json", "take_any_text"]

_KEEP = frozenset("\n\t")
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def take_any_text() -> None:
    """Let standard output write what its encoding has no character for as an escape; Python lets standard error do so anyway."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: object, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Print `text`, made `printable`, at once; to standard output unless a stream is named."""
    # At once: a reader of a pipe, such as the caller of a command, waits for the line, and a run may take hours.
    print(printable(str(text)), file=stream or sys.stdout, end=end, flush=True)


def say_json(value: Any) -> None:
    """Print `value` as one line of JSON in printable ASCII, at once, to standard output."""
    # Of what JSON leaves as it is, only this is a control character; the escapes of `printable` are none that JSON has.
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def guard_logs() -> None:
    """Make the message of every log record of this process `printable`, whichever library logs and whoever shows it."""
    logging.setLogRecordFactory(_SafeRecord)


class _SafeRecord(logging.LogRecord):
    """A record whose message and traceback are safe to show; every handler and formatter asks for them here."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # A formatter takes the text of a traceback from here where there is one; its last line is the message of the error.
        if self.exc_info:
            self.exc_text = printable(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        """Return the message with its arguments put in."""
        return printable(super().getMessage())


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
