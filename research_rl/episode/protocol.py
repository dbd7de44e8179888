"""The tags of the ReSearch protocol and the text rules around them. Knows strings; knows no tokens, no scores.

Source: arXiv 2503.19470, table 1. The model writes `<think>`, `<search>` and `<answer>` blocks; the environment
alone writes `<result>` blocks.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = [
    "ANSWER_CLOSE",
    "ANSWER_OPEN",
    "BOXED_OPEN",
    "RESULT_CLOSE",
    "RESULT_OPEN",
    "SEARCH_CLOSE",
    "SEARCH_OPEN",
    "TAGS",
    "THINK_CLOSE",
    "THINK_OPEN",
    "fold",
    "last_query",
    "neutralise",
]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SEARCH_OPEN, SEARCH_CLOSE = "<search>", "</search>"
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
BOXED_OPEN = "\\boxed{"
TAGS = (
    THINK_OPEN,
    THINK_CLOSE,
    SEARCH_OPEN,
    SEARCH_CLOSE,
    RESULT_OPEN,
    RESULT_CLOSE,
    ANSWER_OPEN,
    ANSWER_CLOSE,
)

# Characters that pass for angle brackets, bars, slashes and Latin letters; NFKC, which `fold` applies first, maps only some of them.
_OPEN = "<＜﹤‹〈⟨〈❬❮⧼˂ᐸ≺"
_CLOSE = ">＞﹥›〉⟩〉❭❯⧽˃ᐳ≻"
_BARS = "｜¦│∣ǀ"
_SLASHES = "／∕⁄⧸\\"
_LETTERS = str.maketrans(
    "аеорсухѕһіԝктпгνιοαρηκτωϲıո" + _BARS + _SLASHES, "aeopcyxshiwktnrvioapnktwcin" + "|" * len(_BARS) + "/" * len(_SLASHES)
)
_LESS, _MORE = (
    rf"(?:[{chars}]|&(?:amp;)*(?:{name}|#0*{code}|#x0*{code:x});?)" for chars, name, code in ((_OPEN, "lt", 60), (_CLOSE, "gt", 62))
)
# At most 80 characters between the brackets: what is longer is prose between two comparison signs, and the search stays linear.
_SPAN = re.compile(rf"{_LESS}((?:(?!{_LESS})[^{_CLOSE}]){{1,80}}?){_MORE}", re.IGNORECASE)
# Not behind the name: a letter or hyphen, so that <search-engine> and <thinking> stay. `|...|` are control marks such as <|im_end|>.
_NAME = re.compile(
    r"\s*(/?)\s*((?:think|search|result|answer|bos|eos|pad|unk|mask|sep|cls|s|start_of_turn|end_of_turn|endoftext)(?![\w-]).*|\|.*\|)\s*",
    re.DOTALL,
)
_START = re.compile(rf"[{_OPEN}&\[]")
_INSTRUCTION = re.compile(r"\[(/?INST)\]", re.IGNORECASE)


def fold(text: str) -> str:
    """Return `text` in the letters it passes for: compatibility forms, letters of other scripts, no invisible characters."""
    return _shown(text).casefold().translate(_LETTERS)


def _shown(text: str) -> str:
    # Nothing in ASCII has a compatibility form or is invisible, and most passages are ASCII.
    if text.isascii():
        return text
    # Cf: zero-width joiners, soft hyphens and directions. Mn: accents, so that a letter with one counts as the letter.
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) not in ("Cf", "Mn"))


def neutralise(text: str) -> str:
    """Return `text` with protocol tags and a tokenizer's control marks in square brackets: a passage can play no role in the dialogue.

    Also those that only look the part: brackets and letters of other scripts, invisible characters, HTML entities, attributes.
    """
    # Most passages hold no such character and are spared the two substitutions.
    return _INSTRUCTION.sub(r"(\1)", _SPAN.sub(_bare, text)) if _START.search(text) else text


def _bare(span: re.Match[str]) -> str:
    # As written, then in the letters that it passes for.
    if not (name := _NAME.fullmatch(span[1])) and not (name := _NAME.fullmatch(fold(span[1]))):
        return span[0]
    return f"[{name[1]}{name[2].strip()}]"


def last_query(text: str) -> str | None:
    """Return the query of a turn that ends with `</search>`; None when no `<search>` opens it, "" when it is blank."""
    body, closed, _ = text.rpartition(SEARCH_CLOSE)
    _, opened, query = body.rpartition(SEARCH_OPEN)
    return query.strip() if closed and opened else None
