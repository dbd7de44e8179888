"""Requests of OpenAI's two formats: the question in them, and the limits they ask for. Knows those formats; knows no HTTP.

The policy was trained on one question without a history: the last message of the user is the question, and how many messages were passed
over is told in the answer. Fields that the service has no use for, such as temperature, are ignored, as the format allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from research_rl.episode.agent import Limits
from research_rl.errors import ConfigError

__all__ = ["ChatRequest", "ResponsesRequest", "StreamOptions"]

# What the formats call a part that is text: in a question, in a chat, and in an earlier answer that is sent along.
_TEXTS = ("input_text", "text", "output_text")


class _Request(BaseModel):
    """What both formats share; the three limits stand in the client's `extra_body`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = Field(default=None, max_length=500)
    stream: bool | None = False
    max_searches: int | None = Field(default=None, ge=0, le=1_000_000)
    top_k: int | None = Field(default=None, ge=1, le=1_000_000)
    wall_s: float | None = Field(default=None, gt=0, le=1e9)

    @property
    def longest(self) -> int | None:
        """Tokens of the whole response, passages included, that the client asks for at most."""
        return None

    @property
    def messages_given(self) -> Sequence[Any]:
        """The messages, the last one last."""
        return ()

    def question(self, longest: int) -> tuple[str, int]:
        """Return the question and how many other messages there are. Raises ConfigError for one that is none or exceeds `longest`."""
        messages = list(self.messages_given)
        asked = [number for number, message in enumerate(messages) if _role(message) == "user"]
        if not asked:
            raise ConfigError("no message of the role user is given; send the question as one")
        text = _text(messages[asked[-1]]).strip()
        if not text:
            raise ConfigError("the last message of the user is blank; send the question in it")
        if len(text) > longest:
            raise ConfigError(f"the question has {len(text):,} characters, agent.max_question_chars is {longest:,}; shorten it")
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
            raise ConfigError("the question holds half a surrogate pair or a NUL, which is no text; send it as UTF-8")
        return text, len(messages) - 1

    def limits(self, server: Limits) -> Limits:
        """Return the limits of this request. Raises ConfigError for one above the server's."""
        asked = {"max_searches": self.max_searches, "top_k": self.top_k, "wall_s": self.wall_s}
        given = {name: value for name, value in asked.items() if value is not None}
        for name, value in given.items():
            if value > (limit := getattr(server, name)):
                raise ConfigError(f"{name}={value:g} exceeds the server's episode.{name}={limit:g}; ask for no more than that")
        # Clients send a length of their own that was meant for other models: it shortens the response and never fails it.
        length = min(self.longest or server.max_response_tokens, server.max_response_tokens)
        return replace(server, **cast(dict[str, Any], given), max_response_tokens=length)


class ResponsesRequest(_Request):
    """The body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    max_output_tokens: int | None = Field(default=None, ge=1)
    previous_response_id: str | None = None
    background: bool | None = False

    @property
    def longest(self) -> int | None:
        """Tokens of the whole response that the client asks for at most."""
        return self.max_output_tokens

    @property
    def messages_given(self) -> Sequence[Any]:
        """The messages of `input`. Raises ConfigError for what needs an earlier response."""
        if self.previous_response_id or self.background:
            raise ConfigError("this service keeps no responses; send previous_response_id and background empty")
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input


class StreamOptions(BaseModel):
    """What a stream of chat chunks ends with."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    include_usage: bool | None = False


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = 1
    stream_options: StreamOptions | None = None

    @property
    def longest(self) -> int | None:
        """Tokens of the whole response that the client asks for at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def messages_given(self) -> Sequence[Any]:
        """The messages. Raises ConfigError for more than one answer."""
        if self.n not in (None, 1):
            raise ConfigError(f"n={self.n} answers are asked for; this service gives one: leave n out")
        return self.messages

    @property
    def usage(self) -> bool:
        """Whether a stream tells the number of tokens at its end."""
        return bool(self.stream_options and self.stream_options.include_usage)


def _role(message: Any) -> Any:
    return cast(Mapping[str, Any], message).get("role")


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message. Raises ConfigError for a message of anything else."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError("the content of the last message of the user is neither a text nor a list of texts; send one of them")
    texts: list[str] = []
    for part in cast(list[Any], content):
        kind, text = (cast(dict[str, Any], part).get(name) for name in ("type", "text")) if isinstance(part, dict) else (None, None)
        if kind not in _TEXTS or not isinstance(text, str):
            raise ConfigError(f"a part of the type {str(kind)[:40]!r} is in the message; this service reads text alone")
        texts.append(text)
    return "\n".join(texts)
