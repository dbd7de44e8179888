"""IRCoT (arXiv 2212.10509): one thought at a time, each followed by a search with that thought, over a growing set of passages.

Constants and control flow are those of ReSearch's published evaluation, quirks included: a thought ends with its first full stop, so that
an abbreviation or a decimal number cuts it; passages are shown best first to the first thought and best last to the others; the search
after the fifth thought serves nothing. The wording is ours, and passages are shown with control marks in square brackets.
"""

from __future__ import annotations

from collections.abc import Sequence

from research_rl.episode.agent import Steps
from research_rl.episode.trajectory import Passage, StopReason
from research_rl.evaluation.methods.base import (
    Block,
    Method,
    Played,
    Tools,
    block,
    fitted,
    play_steps,
    template,
    title_and_text,
    written,
)
from research_rl.evaluation.results import HeldOutQuestion

__all__ = ["IRCOT"]

_THOUGHTS = 5
_TRIGGER = "So the answer is:"
_STOP = (".", "\n")
_INSTRUCTION = template("ircot")


async def _ircot(question: HeldOutQuestion, tools: Tools) -> Played:
    thoughts: list[str] = []

    async def body(steps: Steps) -> StopReason:
        passages = await steps.search(question.question)
        for _ in range(_THOUGHTS):
            shown = _documents(passages)
            steps.show(tools.tokenizer.encode(shown.text), shown.text, shown.places)
            prompt = f"{_INSTRUCTION}\n\n\n\n{shown.text}Question: {question.question}\nThought:{' '.join(thoughts)}"
            await steps.turn(fitted(tools, tools.tokenizer.encode(prompt)), _STOP, tools.limits.max_response_tokens)
            thoughts.append(_thought(written(tools, steps.trajectory)))
            if _TRIGGER in thoughts[-1]:
                return StopReason.ANSWERED
            passages = _merged(passages, await steps.search(thoughts[-1].strip()))
        return StopReason.MALFORMED

    trajectory = await play_steps(tools, body)
    failed = trajectory.stop in (StopReason.ENGINE_FAILURE, StopReason.TIME_LIMIT)
    return Played(trajectory, "" if failed else _prediction(" ".join(thoughts)))


def _thought(text: str) -> str:
    """Return a turn's text up to its first stop string, that included: a token may hold more than the stop string."""
    ends = [text.index(stop) + len(stop) for stop in _STOP if stop in text]
    return text[: min(ends)] if ends else text


def _merged(before: Sequence[Passage], latest: Sequence[Passage]) -> list[Passage]:
    """Return the passages of both, each once with its highest score, the best last."""
    best: dict[str, Passage] = {}
    for passage in (*before, *latest):
        if passage.id not in best or passage.score > best[passage.id].score:
            best[passage.id] = passage
    return sorted(best.values(), key=lambda passage: passage.score)


def _documents(passages: Sequence[Passage]) -> Block:
    parts = ((passage.id, *title_and_text(passage)) for passage in passages)
    return block((name, f"Wikipedia Title: {title}\n{text}\n\n") for name, title, text in parts)


def _prediction(output: str) -> str:
    """Return what stands between the first trigger and a second one; the whole output where there is none."""
    parts = output.split(_TRIGGER)
    return parts[1].strip() if len(parts) > 1 else output


IRCOT = Method(
    "ircot",
    "up to five thoughts, each followed by a search with it, over all passages found so far",
    _ircot,
    (_INSTRUCTION, _TRIGGER),
    separate_calls=True,
    revision=1,
)
