"""Both published rules once more, from their statement alone and by other means than `research_rl.reward.rules`: one pattern for all
tags, a state machine for searches, a recursive box. For tests; slow and plain on purpose."""

from __future__ import annotations

import re
import string

_TAGS = re.compile(r"<(/?)(think|search|result|answer)>")


def squad(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in re.sub(r"\b(?:a|an|the)\b", " ", kept).split()]


def f1(prediction: str, golds: list[str]) -> float:
    best = 0.0
    for gold in golds:
        said, wanted = squad(prediction), squad(gold)
        closed = ("yes", "no", "noanswer")
        if " ".join(said) != " ".join(wanted) and (" ".join(said) in closed or " ".join(wanted) in closed):
            continue
        left, shared = list(wanted), 0
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(said), shared / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def well_formed(text: str) -> bool:
    """Thinks paired in number and there, one answer with a box, each search followed by its end and by one result."""
    seen = [("/" if closing else "") + name for closing, name in _TAGS.findall(text)]
    if not seen.count("think") or seen.count("think") != seen.count("/think"):
        return False
    if seen.count("answer") != 1 or seen.count("/answer") != 1 or seen.index("answer") > seen.index("/answer"):
        return False
    awaited: list[str] = []
    for tag in seen:
        if not awaited and tag == "search":
            awaited = ["/search", "result", "/result"]
        elif awaited and tag == awaited[0]:
            awaited.pop(0)
    inside = text[text.index("<answer>") + 8 : text.index("</answer>")]
    return not awaited and "\\boxed{" in inside and "}" in inside


def box(text: str) -> str | None:
    """The last box of the first answer; the form without braces wins and ends at a dollar."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    inside = found[1] if found else ""
    if "\\boxed " in inside:
        return re.split(r"\\boxed ", inside)[-1].split("$")[0]
    last = list(re.finditer(r"\\boxed", inside))
    if not last or not inside[last[-1].end() :].startswith("{"):
        return None
    rest = inside[last[-1].end() :]
    for end in range(1, len(rest) + 1):
        if rest[:end].endswith("}") and rest[:end].count("{") == rest[:end].count("}"):
            return rest[1 : end - 1]
    return None


def paper(text: str, golds: list[str], ended: bool) -> float:
    """Equation 2: F1 where it is above 0, else a tenth for the format."""
    score = f1(box(text) or "", golds)
    return score if score > 0 else 0.1 if well_formed(text) and ended else 0.0


def repository(text: str, golds: list[str], ended: bool) -> float:
    """The published code: nothing without format, end and a readable box; then F1, a tenth where it is 0."""
    if not well_formed(text) or not ended or box(text) is None:
        return 0.0
    return f1(box(text) or "", golds) or 0.1
