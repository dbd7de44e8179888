"""Grade one trajectory. Knows segments and strings; knows no tokens, no retriever.

Two rules, both of ReSearch, which differ:
  paper       r = F1 if F1 > 0; 0.1 if F1 = 0 and the format is right; 0 otherwise      (arXiv 2503.19470, eq. 2)
  repository  r = 0 if the format is wrong or the response is not ended by eos; else F1 if F1 > 0; else 0.1
              (verl/utils/reward_score/re_search.py)

Deviations from the published code: (1) only model-authored text is read; a block written by search stands as an empty
`<result></result>`, so that a passage can neither win nor destroy the reward. (2) The response is given as segments, so
it needs no splitting at the assistant's delimiter, whose second occurrence cuts the response there. (3) "Ended by eos" is
what the engine reported, not the decoded text's end; the paper's rule, which does not name it, counts it as part of the
format. (4) `\\fbox`, which the published code finds and then refuses, is no box. (5) F1 in scripts without spaces between words
is by character (`metrics`). Quirks kept: an F1 below 0.1 earns less than a wrong answer in the right format; nothing asks for a
search; an empty box is a wrong answer in the right format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from research_rl.episode import protocol
from research_rl.episode.trajectory import Author, Segment, Trajectory
from research_rl.reward.metrics import exact_match, token_f1

__all__ = ["FORMAT_REWARD", "Grade", "Rule", "answer", "boxed", "check_format", "grade", "graded_text", "score_text"]

Rule = Literal["paper", "repository"]
FORMAT_REWARD = 0.1
# The format rule looks for a result after each search; the text of passages is not graded.
_EMPTY_RESULT = f" {protocol.RESULT_OPEN}\n{protocol.RESULT_CLOSE}"


@dataclass(frozen=True)
class Grade:
    """`score` is the reward; `f1` and `em` grade the prediction whatever the format; `reason` names the first fault.

    Of a graded episode (`grader.Grader`): `parts` sum to the score, `suspicion` is the first sign of reward hacking, `judge` says
    whether the judge was asked or failed.
    """

    score: float
    f1: float
    em: float
    format_ok: bool
    reason: str
    prediction: str
    parts: dict[str, float] = field(default_factory=dict[str, float])
    suspicion: str | None = None
    judge: str | None = None


def grade(trajectory: Trajectory, golds: Sequence[str], rule: Rule, eos_token: str) -> Grade:
    """Grade a trajectory against its gold answers."""
    text = graded_text(trajectory.segments).removesuffix(eos_token)
    return score_text(text, golds, rule, ended_by_eos=trajectory.ended_by_eos)


def graded_text(segments: Iterable[Segment]) -> str:
    """Return the response as the reward sees it: the model's words, and an empty result block for each search."""
    return "".join(s.text if s.author is Author.MODEL else _EMPTY_RESULT for s in segments)


def score_text(text: str, golds: Sequence[str], rule: Rule, *, ended_by_eos: bool) -> Grade:
    """Grade a response text (without its eos token) by one of the two rules."""
    fault = check_format(text)
    if fault is None and not ended_by_eos:
        fault = "not ended by eos"
    extracted = boxed(answer(text))
    if fault is None and extracted is None and rule == "repository":
        fault = "the boxed answer cannot be read"
    # Read even when the format is wrong: the rule of the paper pays F1 regardless of the format.
    prediction = (extracted or "").strip()
    f1, em = token_f1(prediction, golds), exact_match(prediction, golds)
    score = f1 or FORMAT_REWARD if fault is None else f1 if rule == "paper" else 0.0
    return Grade(score, f1, em, fault is None, fault or "ok", prediction)


def check_format(text: str) -> str | None:
    """Return the first fault of the published format rule, None when there is none (steps 1-4 of that rule)."""
    opened, closed = text.count(protocol.THINK_OPEN), text.count(protocol.THINK_CLOSE)
    if opened != closed or opened == 0:
        return f"{opened} <think> and {closed} </think>"
    if text.count(protocol.ANSWER_OPEN) != 1 or text.count(protocol.ANSWER_CLOSE) != 1:
        return "not exactly one <answer> and one </answer>"
    if not _searches_closed(text):
        return "a <search> without </search>, <result>, </result> in this order"
    if text.index(protocol.ANSWER_OPEN) > text.index(protocol.ANSWER_CLOSE):
        return "</answer> before <answer>"
    block = answer(text)
    if protocol.BOXED_OPEN not in block or "}" not in block:
        return "no \\boxed{} in the answer"
    return None


def boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed`, found as the published code finds it; None where that fails.

    The last `\\boxed{...}` with its braces matched; the older form `\\boxed x` wins where it occurs and runs up to `$`.
    """
    # As published: this form is looked for first, wherever it stands.
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith(protocol.BOXED_OPEN, start):
        return None
    begin, depth = start + len(protocol.BOXED_OPEN), 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _searches_closed(text: str) -> bool:
    """Whether each <search> has </search>, <result> and </result> after it, in this order.

    As in the published code the <result> is the first one after <search>: one that the model wrote inside its query is before
    </search>, and the order is wrong.
    """
    search = text.find(protocol.SEARCH_OPEN)
    while search >= 0:
        search_end, result = text.find(protocol.SEARCH_CLOSE, search), text.find(protocol.RESULT_OPEN, search)
        result_end = text.find(protocol.RESULT_CLOSE, result)
        if result < 0 or not search < search_end < result < result_end:
            return False
        search = text.find(protocol.SEARCH_OPEN, result_end)
    return True


def answer(text: str) -> str:
    """Return what stands between the first <answer> and the </answer> after it; "" when there is no such pair."""
    _, _, after_open = text.partition(protocol.ANSWER_OPEN)
    body, closed, _ = after_open.partition(protocol.ANSWER_CLOSE)
    return body if closed else ""
