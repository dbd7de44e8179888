"""Parts of an answer as events and objects of OpenAI's Responses API. Knows that format; knows no HTTP.

What the format has no place for stands under `research` in the response, and beside the fields of a citation and of a search.
Invariants: (1) every item that is added is done before the response is; (2) the events' sequence numbers count from 0 without a gap;
(3) the response of the last event holds everything that was told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from research_rl.agent.answering import Asked, Finished, Found, Part, Thought, Words, title
from research_rl.agent.citations import Citation
from research_rl.episode.agent import Limits
from research_rl.episode.trajectory import Passage, StopReason

__all__ = ["FAILED", "Response", "citation_json", "facts", "passage_json"]

Json = dict[str, Any]
FAILED = "the model server failed while it answered; ask again, or see the log of the service under this request's id"
# The format has one reason that fits; for the others ours stand.
_INCOMPLETE = {StopReason.TOKEN_LIMIT: "max_output_tokens"}


def passage_json(passage: Passage) -> Json:
    """Return a passage as a result of a file search."""
    return {"file_id": passage.id, "filename": title(passage), "score": passage.score, "text": passage.contents, "attributes": {}}


def citation_json(citation: Citation) -> Json:
    """Return where the answer stands."""
    return {
        "passage_id": citation.passage_id,
        "search": citation.search,
        "rank": citation.rank,
        "start": citation.start,
        "end": citation.end,
        "text": citation.text,
        "read": citation.read,
    }


def facts(finished: Finished, seconds: float) -> Json:
    """Return what both formats carry under `research`."""
    trajectory = finished.trajectory
    return {
        "stop_reason": trajectory.stop.value,
        "answer": finished.answer,
        "supported": finished.supported,
        "citations": [citation_json(citation) for citation in finished.citations],
        "searches": len(trajectory.searches),
        "failed_searches": sum(record.error is not None for record in trajectory.searches),
        "seconds": {
            "total": round(seconds, 3),
            "model": round(trajectory.engine_seconds, 3),
            "search": round(trajectory.search_seconds, 3),
        },
    }


class Response:
    """One response while it grows. `take` returns the events of a part; `object` is the response as it stands."""

    def __init__(self, identifier: str, model: str, limits: Limits, more: Mapping[str, Any]) -> None:
        self.failed = False
        self._id, self._started, self._number = identifier, time.monotonic(), 0
        self._open: str | None = None
        self.object: Json = {
            "id": f"resp_{identifier}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {"request_id": identifier},
            "model": model,
            "output": [],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "max_output_tokens": limits.max_response_tokens,
            "max_tool_calls": limits.max_searches,
            "usage": None,
            "research": {**more, "limits": {"max_searches": limits.max_searches, "top_k": limits.top_k, "wall_s": limits.wall_s}},
        }

    def begin(self) -> list[Json]:
        """Return the events before the first part."""
        # Copies, for these events say how the response began, and the object grows on.
        return [self._event("response.created", response=self._copy()), self._event("response.in_progress", response=self._copy())]

    def take(self, part: Part) -> list[Json]:
        """Return the events that tell a part."""
        match part:
            case Thought():
                return [*self._opened("reasoning"), self._delta("response.reasoning_text.delta", part.text)]
            case Words():
                return [*self._opened("message"), self._delta("response.output_text.delta", part.text, logprobs=[])]
            case Asked():
                return self._asked(part)
            case Found():
                return self._found(part)
            case Finished():
                return self._finished(part)
            case _:
                return []

    def fail(self, why: str) -> list[Json]:
        """Return the events that end it after a fault of the service itself; what was open stays unfinished."""
        self.failed = True
        self.object |= {"status": "failed", "error": {"code": "server_error", "message": why}}
        return [self._event("response.failed", response=self.object)]

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _copy(self) -> Json:
        return {**self.object, "output": list(self.object["output"])}

    @property
    def _place(self) -> int:
        return len(self.object["output"]) - 1

    @property
    def _item(self) -> Json:
        return self.object["output"][-1]

    def _add(self, prefix: str, kind: str, **fields: Any) -> Json:
        """Append an item and return the event for it."""
        item = {"id": f"{prefix}_{self._id}_{len(self.object['output'])}", "type": kind, "status": "in_progress", **fields}
        self.object["output"].append(item)
        # A copy: the event is sent now and the item still grows.
        return self._event("response.output_item.added", output_index=self._place, item={**item})

    def _of_item(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self._item["id"], output_index=self._place, **fields)

    def _opened(self, kind: str) -> list[Json]:
        """Return the events that close what is open and open an item of text, unless one of that kind is open."""
        if self._open == kind:
            return []
        events = self._closed()
        self._open = kind
        if kind == "message":
            events.append(self._add("msg", kind, role="assistant", content=[]))
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            events.append(self._add("rs", kind, summary=[], content=[]))
            part = {"type": "reasoning_text", "text": ""}
        events.append(self._of_item("response.content_part.added", content_index=0, part={**part}))
        self._item["content"] = [part]
        return events

    def _delta(self, kind: str, text: str, **fields: Any) -> Json:
        self._item["content"][0]["text"] += text
        return self._of_item(kind, content_index=0, delta=text, **fields)

    def _closed(self, citations: tuple[Citation, ...] = (), status: str = "completed") -> list[Json]:
        """Return the events that close the open item of text, if there is one, with this status."""
        if self._open is None:
            return []
        part, events = self._item["content"][0], list[Json]()
        if self._open == "message":
            for citation in citations:
                part["annotations"].append(self._annotation(citation, len(part["text"])))
                place = len(part["annotations"]) - 1
                events.append(
                    self._of_item(
                        "response.output_text.annotation.added",
                        content_index=0,
                        annotation_index=place,
                        annotation=part["annotations"][place],
                    )
                )
            events.append(self._of_item("response.output_text.done", content_index=0, text=part["text"], logprobs=[]))
        else:
            events.append(self._of_item("response.reasoning_text.done", content_index=0, text=part["text"]))
        self._open = None
        return [*events, self._of_item("response.content_part.done", content_index=0, part=part), self._done(status)]

    def _annotation(self, citation: Citation, index: int) -> Json:
        # A citation's number counts every search, failed ones included, and so do these items.
        search = [item for item in self.object["output"] if item["type"] == "file_search_call"][citation.search]
        name = search["results"][citation.rank]["filename"]
        return {
            "type": "file_citation",
            "file_id": citation.passage_id,
            "filename": name,
            "index": index,
            **citation_json(citation),
        }

    def _done(self, status: str) -> Json:
        self._item["status"] = status
        return self._event("response.output_item.done", output_index=self._place, item=self._item)

    def _asked(self, part: Asked) -> list[Json]:
        events = self._closed()
        events.append(self._add("fs", "file_search_call", queries=[part.query], results=None))
        return [
            *events,
            self._of_item("response.file_search_call.in_progress"),
            self._of_item("response.file_search_call.searching"),
        ]

    def _found(self, part: Found) -> list[Json]:
        self._item["results"] = [passage_json(passage) for passage in part.passages]
        if part.record.error is not None:
            self._item["error"] = part.record.error
            return [self._done("failed")]
        return [self._of_item("response.file_search_call.completed"), self._done("completed")]

    def _finished(self, part: Finished) -> list[Json]:
        stop = part.trajectory.stop
        kind = "completed" if stop is StopReason.ANSWERED else "failed" if stop is StopReason.ENGINE_FAILURE else "incomplete"
        # What was being written when the episode ended early is as unfinished as the response.
        events = self._closed(part.citations, "completed" if kind == "completed" else "incomplete")
        # An episode that was cut off within a search leaves it open.
        if self.object["output"] and self._item["status"] == "in_progress":
            events.append(self._done("incomplete"))
        self.object["usage"] = {
            "input_tokens": part.read_tokens,
            # The format has no usage without these details, and the engine does not tell what its cache saved.
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": part.written_tokens,
            "output_tokens_details": {"reasoning_tokens": max(part.written_tokens - part.answer_tokens, 0)},
            "total_tokens": part.read_tokens + part.written_tokens,
        }
        self.object["research"] |= facts(part, time.monotonic() - self._started)
        self.failed = kind == "failed"
        self.object["status"] = kind
        if self.failed:
            self.object["error"] = {"code": "server_error", "message": FAILED}
        elif kind == "incomplete":
            self.object["incomplete_details"] = {"reason": _INCOMPLETE.get(stop, stop.value)}
        return [*events, self._event(f"response.{kind}", response=self.object)]
