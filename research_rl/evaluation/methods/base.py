"""What a method of answering is, and what all of them use. Knows engine, searcher and tokenizer; knows no server and no file of results.

A method is a coroutine over one question that leaves a Trajectory. Our own protocol is one growing sequence of tokens. The others make
several calls, each with a prompt of its own; their trajectory holds in order what the model was shown and what it wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from research_rl.config import PromptConfig
from research_rl.config.template_text import template_text
from research_rl.episode import protocol
from research_rl.episode.agent import Engine, Limits, Searcher, Steps, recorded
from research_rl.episode.prompts import FolderTokenizer
from research_rl.episode.trajectory import Passage, Place, StopReason, Trajectory
from research_rl.errors import ConfigError, ModelError
from research_rl.evaluation.results import HeldOutQuestion

__all__ = [
    "LONGEST_PROMPT",
    "Block",
    "Body",
    "Method",
    "Played",
    "Tools",
    "block",
    "documents",
    "ended",
    "fitted",
    "lost_prompt",
    "own_text",
    "play_steps",
    "template",
    "title_and_text",
    "written",
]

LONGEST_PROMPT = 8192
"""Tokens of the longest prompt of one call, as in the published evaluation; a longer one loses its middle."""
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Tools:
    """What a method plays with. `limits` are those of our protocol; `passages` finds passages by their ids.

    `longest_prompt` is the number of tokens that the model server leaves for the prompt of a call with its whole answer.
    """

    engine: Engine
    searcher: Searcher
    tokenizer: FolderTokenizer
    prompt: PromptConfig
    limits: Limits
    passages: Callable[[Sequence[str]], Sequence[Passage]]
    published_limits: bool = False
    longest_prompt: int = LONGEST_PROMPT


@dataclass(frozen=True)
class Played:
    """What became of a question; `prediction` is None where our protocol's own rule reads it out of the trajectory."""

    trajectory: Trajectory
    prediction: str | None = None


Play = Callable[[HeldOutQuestion, Tools], Awaitable[Played]]
Body = Callable[[Steps], Awaitable[StopReason]]


@dataclass(frozen=True)
class Method:
    """A way of answering. `texts` is all that its prompts say beside question and passages: a tokenizer must be able to say it.

    `separate_calls` tells that each call has a prompt of its own, up to `LONGEST_PROMPT`; `chat` that instructions must go through the
    model's chat template where `prompt.template` is instruct; `needs_support` that questions must name the passages that answer them;
    `searches` that the model is shown what a search of the index found; `revision` counts the times that what it does was changed, so
    that results of before are not taken for results of now.
    """

    name: str
    summary: str
    play: Play
    texts: tuple[str, ...]
    separate_calls: bool = False
    chat: bool = False
    needs_support: bool = False
    searches: bool = True
    revision: int = 0

    @property
    def sha256(self) -> str:
        """The hash of its texts and its revision: another wording or another course gives other results."""
        decisive = [*self.texts, *([f"revision {self.revision}"] if self.revision else [])]
        return hashlib.sha256("\0".join(decisive).encode()).hexdigest()

    def refusal(self, tokenizer: FolderTokenizer, prompt: PromptConfig, questions: Sequence[HeldOutQuestion]) -> str | None:
        """Return why it cannot be played with this tokenizer and these questions, None when it can."""
        if self.chat and prompt.template == "instruct" and tokenizer.chat_template is None:
            return "prompt.template=instruct, and the model has no chat template; set prompt.template=base"
        if unknown := next((word for text in self.texts for word in text.split() if not _expressible(tokenizer, word)), None):
            return f"the model's vocabulary cannot express {unknown!r} of the prompt"
        without = sum(not question.supporting for question in questions)
        if self.needs_support and without:
            return f"{without} of {len(questions)} questions name no supporting passages"
        return None


def _expressible(tokenizer: FolderTokenizer, word: str) -> bool:
    # Tokenizers may add or drop spaces around a word and letters' case; a word that became another one is lost.
    return "".join(tokenizer.decode(tokenizer.encode(word)).split()).casefold() == word.casefold()


def template(name: str) -> str:
    """Return the text of a method's prompt."""
    return (_TEMPLATES / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


async def play_steps(tools: Tools, body: Body) -> Trajectory:
    """Run a method of several calls within the limits of an episode."""
    return await recorded(Trajectory(()), body, tools.engine, tools.searcher, tools.tokenizer, tools.limits)


def lost_prompt(error: ConfigError | ModelError) -> Played:
    """Return what a question without a prompt leaves: it must not end the others."""
    return Played(Trajectory((), stop=StopReason.ENGINE_FAILURE, error=str(error)))


def written(tools: Tools, trajectory: Trajectory) -> str:
    """Return what the model wrote in its last turn, special tokens left out."""
    return tools.tokenizer.plain(trajectory.segments[-1].ids)


def ended(finished_by: str) -> StopReason:
    """Return the stop reason of a method's last call, whose whole text is the answer."""
    return StopReason.TOKEN_LIMIT if finished_by == "length" else StopReason.ANSWERED


def fitted(tools: Tools, ids: list[int]) -> list[int]:
    """Return prompt ids of at most `longest_prompt` tokens: of a longer prompt the first and the last half of them.

    As in the published evaluation a cut prompt loses its special tokens, those of the chat template included.
    """
    longest = min(LONGEST_PROMPT, tools.longest_prompt)
    if len(ids) <= longest:
        return ids
    half, encode = longest // 2, tools.tokenizer.encode
    first, last = tools.tokenizer.plain(ids[:half]), tools.tokenizer.plain(ids[-half:])
    joined = encode(first + last)
    if len(joined) <= longest:
        return joined
    # Halves that were cut within a word may take more tokens than before. The prompt's end holds the question, so its first half gives way.
    tail = encode(last)[-longest:]
    return encode(first)[: longest - len(tail)] + tail


@dataclass(frozen=True)
class Block:
    """Passages as a model reads them: their text, and which of them stands where in it."""

    text: str
    places: tuple[Place, ...]


def block(parts: Iterable[tuple[str, str]]) -> Block:
    """Return the texts of passages, given as (id, text), one behind the other."""
    text, places = "", list[Place]()
    for name, part in parts:
        places.append((name, len(text), len(text) + len(part)))
        text += part
    return Block(text, tuple(places))


def documents(passages: Sequence[Passage]) -> Block:
    """Return passages as numbered documents, best first."""
    parts = ((passage.id, *title_and_text(passage)) for passage in passages)
    return block((name, f"Doc {number}(Title: {title}) {text}\n") for number, (name, title, text) in enumerate(parts, 1))


def title_and_text(passage: Passage) -> tuple[str, str]:
    """Return a passage's first line, its title, and the other lines; control marks in square brackets, as in our own protocol."""
    title, _, text = protocol.neutralise(passage.contents).partition("\n")
    return title, text


def own_text(prompt: PromptConfig) -> str | None:
    """Return the user's own prompt file, None where `prompt.template` names none."""
    return template_text(prompt.template, prompt.path) if prompt.template == "file" else None
