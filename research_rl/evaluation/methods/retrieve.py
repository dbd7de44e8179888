"""Answering without training: zero-shot, naive retrieval-augmented generation, and Iter-RetGen (arXiv 2305.15294).

Constants and control flow are those of ReSearch's published evaluation, the wording is ours. Deviations: passages are shown with control
marks in square brackets; a model is a chat model when `prompt.template` is instruct, and with file when it has a chat template, not when
its path says so. With file the user's words are those of our protocol, and these methods keep their own.
"""

from __future__ import annotations

from research_rl.episode.agent import Steps
from research_rl.episode.trajectory import StopReason
from research_rl.evaluation.methods.base import Body, Method, Played, Tools, documents, ended, fitted, play_steps, template, written
from research_rl.evaluation.results import HeldOutQuestion

__all__ = ["ITER_RETGEN", "NAIVE", "ZERO_SHOT"]

_ITERATIONS = 3
_QUESTION = "Question: {question}"
_WITHOUT, _WITH = template("zero-shot"), template("naive")


async def _zero_shot(question: HeldOutQuestion, tools: Tools) -> Played:
    async def body(steps: Steps) -> StopReason:
        return await _answer(question, tools, steps, _WITHOUT)

    return await _played(tools, body)


async def _naive(question: HeldOutQuestion, tools: Tools) -> Played:
    async def body(steps: Steps) -> StopReason:
        return await _read(question, tools, steps, question.question)

    return await _played(tools, body)


async def _iter_retgen(question: HeldOutQuestion, tools: Tools) -> Played:
    async def body(steps: Steps) -> StopReason:
        stop = await _read(question, tools, steps, question.question)
        for _ in range(_ITERATIONS - 1):
            # The whole generation, also one that the token limit cut: no iteration ends the question early.
            stop = await _read(question, tools, steps, f"{question.question} {written(tools, steps.trajectory)}")
        return stop

    return await _played(tools, body)


async def _played(tools: Tools, body: Body) -> Played:
    trajectory = await play_steps(tools, body)
    # A turn that the engine or the clock ended says nothing, while a cut one is graded as it stands.
    whole = trajectory.stop in (StopReason.ANSWERED, StopReason.TOKEN_LIMIT)
    return Played(trajectory, written(tools, trajectory) if whole else "")


async def _read(question: HeldOutQuestion, tools: Tools, steps: Steps, query: str) -> StopReason:
    """Search once and answer from what was found."""
    shown = documents(await steps.search(query))
    steps.show(tools.tokenizer.encode(shown.text), shown.text, shown.places)
    return await _answer(question, tools, steps, f"{_WITH}\n\n{shown.text}")


async def _answer(question: HeldOutQuestion, tools: Tools, steps: Steps, system: str) -> StopReason:
    user = _QUESTION.replace("{question}", question.question)
    chat = tools.tokenizer.chat_template if tools.prompt.template != "base" else None
    text = chat.render(system, user) if chat else f"{system}\n\n{user}"
    completion, _ = await steps.turn(fitted(tools, tools.tokenizer.encode(text)), (), tools.limits.max_response_tokens)
    return ended(completion.finished_by)


_TEXTS = (_QUESTION.replace("{question}", ""),)
ZERO_SHOT = Method(
    "zero-shot",
    "one answer, without a search",
    _zero_shot,
    (_WITHOUT, *_TEXTS),
    separate_calls=True,
    chat=True,
    searches=False,
    revision=1,
)
NAIVE = Method("naive", "one search with the question, one answer", _naive, (_WITH, *_TEXTS), separate_calls=True, chat=True, revision=1)
ITER_RETGEN = Method(
    "iter-retgen",
    "three times: search with the question and the last answer, answer from the new passages",
    _iter_retgen,
    (_WITH, *_TEXTS),
    separate_calls=True,
    chat=True,
    revision=1,
)
