"""The protocol of Search-R1 (arXiv 2503.09516), for models that were trained with it.

The model reasons in `<think>`, asks in `<search>`, reads in `<information>` and answers in `<answer>`. Constants are those of its training:
500 tokens a turn, a message after a turn that does neither, and after the last search one turn more whose search is not made. The number
of searches is `episode.max_searches`, a result's limit `episode.max_result_tokens`. A published model wants its own words: give them as
`prompt.template=file`; they are the user's turn. Deviation: an answer is read in the model's own turns only, never in a passage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from research_rl.config.template_text import PLACE
from research_rl.episode import protocol
from research_rl.episode.agent import Limits, Steps, recorded
from research_rl.episode.trajectory import Author, Passage, Place, StopReason, Trajectory
from research_rl.errors import ConfigError, ModelError
from research_rl.evaluation.methods.base import Method, Played, Tools, documents, lost_prompt, own_text, template
from research_rl.evaluation.results import HeldOutQuestion

__all__ = ["SEARCH_R1"]

_TURN_TOKENS = 500
_STOP = (protocol.SEARCH_CLOSE, protocol.ANSWER_CLOSE)
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_OPEN, _CLOSE = "\n\n<information>", "</information>\n\n"
_INVALID = (
    "\nThat action is invalid. To search, put the query between <search> and </search>. To give the answer, put it between <answer> and "
    "</answer>. Let me try again.\n"
)
_PROMPT = template("search-r1")


async def _search_r1(question: HeldOutQuestion, tools: Tools) -> Played:
    text = (own_text(tools.prompt) or _PROMPT).replace(PLACE, question.question)
    try:
        chat = tools.tokenizer.chat_template
        prompt = tools.tokenizer.encode(chat.render_user(text) if chat else text)
    except (ConfigError, ModelError) as error:
        return lost_prompt(error)
    trajectory = await recorded(
        Trajectory(tuple(prompt)),
        lambda steps: _SearchR1(steps, list(prompt)).run(),
        tools.engine,
        tools.searcher,
        tools.tokenizer,
        tools.limits,
    )
    return Played(trajectory, _prediction(trajectory))


class _SearchR1:
    def __init__(self, steps: Steps, context: list[int]) -> None:
        self._steps, self._context, self._prompt_tokens = steps, context, len(context)

    @property
    def _limits(self) -> Limits:
        return self._steps.limits

    @property
    def _left(self) -> int:
        return self._limits.max_response_tokens - (len(self._context) - self._prompt_tokens)

    async def run(self) -> StopReason:
        for turn in range(self._limits.max_searches + 1):
            if self._left <= 0:
                return StopReason.TOKEN_LIMIT
            completion, text = await self._steps.turn(self._context, _STOP, min(_TURN_TOKENS, self._left))
            self._context += completion.ids
            action = _ACTION.search(text)
            if action and action[1] == "answer":
                return StopReason.ANSWERED
            if turn == self._limits.max_searches:
                return StopReason.SEARCH_LIMIT if action else StopReason.MALFORMED
            if action:
                self._inform(await self._steps.search(action[2].strip()))
            else:
                self._show(self._steps.tokenizer.encode(_INVALID), message=True)
        return StopReason.SEARCH_LIMIT

    def _inform(self, passages: Sequence[Passage]) -> None:
        """Append passages, cut to the limit of a result."""
        tokenizer, block = self._steps.tokenizer, documents(passages)
        body = tokenizer.encode(block.text.strip())
        cut = body[: self._limits.max_result_tokens]
        # The cut may fall within a passage, whose place then ends where the shown text does.
        length = len(block.text.strip() if len(cut) == len(body) else tokenizer.decode(cut))
        places = [(name, len(_OPEN) + start, len(_OPEN) + min(end, length)) for name, start, end in block.places if start < length]
        self._show([*tokenizer.encode(_OPEN), *cut, *tokenizer.encode(_CLOSE)], places)

    def _show(self, ids: list[int], passages: Sequence[Place] | None = None, *, message: bool = False) -> None:
        ids = ids[: max(self._left, 0)]
        self._steps.show(ids, passages=passages, message=message)
        self._context += ids


def _prediction(trajectory: Trajectory) -> str:
    """Return what stands in the last complete answer of the model."""
    own = "".join(segment.text for segment in trajectory.segments if segment.author is Author.MODEL)
    answers = [action[2].strip() for action in _ACTION.finditer(own) if action[1] == "answer"]
    return answers[-1] if answers else ""


SEARCH_R1 = Method(
    "search-r1", "the protocol of Search-R1, for models trained with it", _search_r1, (_PROMPT.replace(PLACE, ""), _INVALID), revision=1
)
