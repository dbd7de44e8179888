"""Both published reward rules, written again from their statement by other means than `research_rl.reward.rules`. For tests.

The published code decides in five steps; the first that fails gives 0:
  1. as many <think> as </think>, at least one;
  2. exactly one <answer> and one </answer>;
  3. for each <search>, scanned from the left: the first </search>, the first <result> and then the first </result> after it
     exist and stand in this order; the scan resumes at that </result>;
  4. <answer> stands before </answer>, with \\boxed{ and } between them;
  5. the response ends with eos, and the last box of the answer can be read.
What passes all five earns F1, and 0.1 where F1 is 0. The implementation walks through positions in the text; this module
states step 3 as one regular language, step 5 by running sums of braces, and F1 by removing words from a list.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from itertools import accumulate

_UP_TO = r"(?:(?!{})[\s\S])*+"
_ELSEWHERE = _UP_TO.format("<search>")
_ONE_SEARCH = "".join(
    [
        "<search>",
        _UP_TO.format("</search>|<result>"),
        "</search>",
        _UP_TO.format("<result>"),
        "<result>",
        _UP_TO.format("</result>"),
        "</result>",
    ]
)
_SEARCHES = re.compile(f"{_ELSEWHERE}(?:{_ONE_SEARCH}{_ELSEWHERE})*+")
_COUNTED = re.compile(r"</?(?:think|answer)>")
_ANSWER = re.compile(r"<answer>([\s\S]*?)</answer>")


@lru_cache(1 << 16)
def squad(text: str) -> tuple[str, ...]:
    """Words in lower case without punctuation and articles."""
    letters = "".join(character for character in text.lower() if character not in string.punctuation)
    return tuple(re.sub(r"\b(?:a|an|the)\b", " ", letters).split())


def f1(prediction: str, golds: list[str]) -> float:
    """The best harmonic mean of precision and recall over the gold answers."""
    return max((_f1(squad(prediction), squad(gold)) for gold in golds), default=0.0)


@lru_cache(1 << 16)
def _f1(predicted: tuple[str, ...], gold: tuple[str, ...]) -> float:
    closed = {("yes",), ("no",), ("noanswer",)}
    if predicted != gold and (predicted in closed or gold in closed):
        return 0.0
    unmatched, shared = list(gold), 0
    for word in predicted:
        if word in unmatched:
            unmatched.remove(word)
            shared += 1
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def well_formed(text: str) -> bool:
    """Steps 1 to 4."""
    tags = Counter(_COUNTED.findall(text))
    block = _ANSWER.search(text)
    return (
        tags["<think>"] == tags["</think>"] > 0
        and tags["<answer>"] == tags["</answer>"] == 1
        and _SEARCHES.fullmatch(text) is not None
        and block is not None
        and all(mark in block[1] for mark in ("\\boxed{", "}"))
    )


def box(text: str) -> str | None:
    """The last box of the answer; a box without braces wins over all others and ends at a dollar sign."""
    block = _ANSWER.search(text)
    inside = block[1] if block else ""
    *_, without_braces = re.split(r"\\boxed ", inside)
    if without_braces != inside:
        return without_braces.split("$")[0]
    *before, last = inside.split("\\boxed")
    if not before or not last.startswith("{"):
        return None
    depths = list(accumulate({"{": 1, "}": -1}.get(character, 0) for character in last))
    return last[1 : depths.index(0)] if 0 in depths else None


def both(text: str, golds: list[str], ended: bool) -> tuple[float, float]:
    """The scores by the paper (equation 2: F1 where it is above 0, else 0.1 for the format) and by the published code."""
    readable, right = box(text), ended and well_formed(text)
    overlap = f1(readable or "", golds)
    return overlap or (0.1 if right else 0.0), (overlap or 0.1) if right and readable is not None else 0.0
