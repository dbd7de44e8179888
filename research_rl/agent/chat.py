"""Parts of an answer as chunks and objects of OpenAI's Chat Completions API. Knows that format; knows no HTTP.

Thoughts and searches stand in `reasoning_content`, as the servers of reasoning models send them; `citations`, `search_results` and
`research` stand beside the choices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from research_rl.agent.answering import Asked, Finished, Found, Part, Thought, Words
from research_rl.agent.responses import FAILED, facts, passage_json
from research_rl.episode.trajectory import StopReason

__all__ = ["Chat"]

Json = dict[str, Any]
_STOPPED = (StopReason.ANSWERED, StopReason.MALFORMED)


class Chat:
    """One completion while it grows. `take` returns the chunks of a part; `object` is the whole, once it is finished."""

    def __init__(self, identifier: str, model: str, more: Mapping[str, Any], *, usage: bool) -> None:
        self.failed = False
        self._started, self._usage, self._more = time.monotonic(), usage, dict(more)
        self._head: Json = {"id": f"chatcmpl-{identifier}", "created": int(time.time()), "model": model}
        self._reasoning = self._content = ""
        self._results: list[Json] = []
        self.object: Json = {}

    def begin(self) -> list[Json]:
        """Return the chunks before the first part."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def take(self, part: Part) -> list[Json]:
        """Return the chunks that tell a part."""
        match part:
            case Thought():
                return [self._thought(part.text)]
            case Asked():
                line = f"\n\nsearch: {part.query}\n" if self._reasoning else f"search: {part.query}\n"
                return [self._thought(line)]
            case Found():
                results = [passage_json(passage) for passage in part.passages]
                self._results.append({"query": part.record.query, "results": results, "error": part.record.error})
                line = part.record.error or ", ".join(result["filename"] for result in results) or "nothing"
                return [self._thought(f"found: {line}\n\n") | {"search_results": self._results[-1:]}]
            case Words():
                self._content += part.text
                return [self._chunk({"content": part.text})]
            case Finished():
                return self._finished(part)
            case _:
                return []

    def fail(self, why: str) -> list[Json]:
        """Return the chunks that end it after a fault of the service itself."""
        self.failed = True
        self.object = {"error": {"message": why, "type": "server_error", "param": None, "code": "error"}}
        return [self.object]

    def _thought(self, text: str) -> Json:
        self._reasoning += text
        return self._chunk({"reasoning_content": text})

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _finished(self, part: Finished) -> list[Json]:
        stop = part.trajectory.stop
        if stop is StopReason.ENGINE_FAILURE:
            self.failed = True
            self.object = {"error": {"message": FAILED, "type": "server_error", "param": None, "code": stop.value}}
            return [self.object]
        usage = {
            "prompt_tokens": part.read_tokens,
            "completion_tokens": part.written_tokens,
            "total_tokens": part.read_tokens + part.written_tokens,
        }
        record = {**self._more, **facts(part, time.monotonic() - self._started)}
        beside = {"citations": [citation.passage_id for citation in part.citations], "research": record}
        finish = "stop" if stop in _STOPPED else "length"
        message = {"role": "assistant", "content": self._content, "reasoning_content": self._reasoning, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        self.object = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage, **beside}
        self.object["search_results"] = self._results
        chunks = [self._chunk({}, finish) | beside]
        if self._usage:
            chunks.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return chunks
