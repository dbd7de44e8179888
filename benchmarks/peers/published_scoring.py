"""How the published code scores an answer, in our own words: ReSearch's reward over the decoded conversation, and FlashRAG's
evaluator, in which every metric normalises prediction and gold answers for itself."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["evaluate", "reward"]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: four passes."""
    lowered = text.lower()
    excluded = set(string.punctuation)
    bare = "".join(character for character in lowered if character not in excluded)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Best token F1; both sides are normalised anew for every gold answer."""
    best = 0.0
    for gold in golds:
        said, wanted = normalise(prediction), normalise(gold)
        if said in ("yes", "no", "noanswer") and said != wanted:
            continue
        if wanted in ("yes", "no", "noanswer") and said != wanted:
            continue
        said_words, wanted_words = said.split(), wanted.split()
        same = sum((Counter(said_words) & Counter(wanted_words)).values())
        if same == 0:
            continue
        precision, recall = same / len(said_words), same / len(wanted_words)
        best = max(best, 2 * precision * recall / (precision + recall))
    return best


def exact(prediction: str, golds: Sequence[str]) -> float:
    """Whether a gold answer equals the prediction."""
    said = normalise(prediction)
    for gold in golds:
        if normalise(gold) == said:
            return 1.0
    return 0.0


def part(prediction: str, golds: Sequence[str]) -> float:
    """Whether a gold answer stands in the prediction."""
    said = normalise(prediction)
    for gold in golds:
        if normalise(gold) in said:
            return 1.0
    return 0.0


def well_formed(response: str) -> bool:
    """The five checks of the published reward, each over the whole response."""
    if response.count("<think>") != response.count("</think>") or response.count("<think>") == 0:
        return False
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return False
    position = 0
    while True:
        start = response.find("<search>", position)
        if start == -1:
            break
        end = response.find("</search>", start)
        found = response.find("<result>", end) if end != -1 else -1
        closed = response.find("</result>", found) if found != -1 else -1
        if closed == -1:
            return False
        position = closed
    start, end = response.find("<answer>"), response.find("</answer>")
    return start < end and "\\boxed{" in response[start:end] and "}" in response[start:end]


def boxed(text: str) -> str | None:
    """The last box by walking its braces; the form with a space ends at a dollar."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    depth, position = 0, start
    while position < len(text):
        if text[position] == "{":
            depth += 1
        if text[position] == "}":
            depth -= 1
            if depth == 0:
                break
        position += 1
    whole = text[start : position + 1]
    return whole[len("\\boxed{") : -1] if position < len(text) and whole.startswith("\\boxed{") else None


def reward(conversation: str, golds: Sequence[str], eos: str) -> float:
    """Prompt and response as one text: split at the assistant's turn, check, extract, compare."""
    delimiter = "<|im_start|>assistant\n"
    response = conversation.split(delimiter)[1] if delimiter in conversation else conversation.split("Assistant:")[1]
    if not well_formed(response) or not response.endswith(eos):
        return 0.0
    response = response[: -len(eos)]
    found = re.search(r"<answer>(.*?)</answer>", response, re.DOTALL)
    prediction = boxed(found.group(1).strip()) if found else None
    if prediction is None:
        return 0.0
    return f1(prediction, golds) or 0.1


def evaluate(conversation: str, golds: Sequence[str]) -> tuple[float, float, float]:
    """EM, F1 and sub-EM of the boxed answer, one evaluator after another."""
    found = re.search(r"<answer>(.*?)</answer>", conversation, re.DOTALL)
    prediction = (boxed(found.group(1)) if found else None) or ""
    return exact(prediction, golds), f1(prediction, golds), part(prediction, golds)
