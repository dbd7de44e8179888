"""What people say of answers: a journal of verdicts, and the questions that come of them. Knows files; knows no MLflow.

Several services of one workspace may write the same files.
Invariants: (1) a verdict is on the disk before it is acknowledged; (2) the last verdict on an answer counts; (3) questions.jsonl follows
from the journal alone, and `data.source=folder` reads it; (4) an answer that this service did not give gets no verdict; (5) both files are
for their owner alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator

from research_rl.errors import ConfigError
from research_rl.pipeline import json_lines
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private

__all__ = ["JOURNAL", "KEPT", "Delivery", "Feedback", "FeedbackRequest", "Given", "UnknownAnswer", "feedback_folder", "rows"]

JOURNAL, QUESTIONS = "feedback.jsonl", "questions.jsonl"
_LOCK = ".lock"
KEPT = 1000
"""Answers that can be judged: the last ones of this service."""
_CHANGES = 20
"""Verdicts that one answer takes."""
_COMMENT_CHARS, _ANSWER_CHARS = 2000, 1000
_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 3600.0
_LOG = logging.getLogger("research_rl.agent")
Json = dict[str, Any]


class UnknownAnswer(ConfigError):
    """A verdict on an answer that this service does not remember."""


class FeedbackRequest(BaseModel):
    """The body of POST /v1/feedback; `answer` is what the user holds right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    response_id: str = Field(min_length=1, max_length=100)
    verdict: Literal["up", "down"]
    comment: str | None = Field(default=None, max_length=_COMMENT_CHARS)
    answer: str | None = Field(default=None, max_length=_ANSWER_CHARS)

    @field_validator("comment", "answer")
    @classmethod
    def _text(cls, text: str | None) -> str | None:
        """Return the text without white space around it, None for a blank one."""
        if text and any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
            raise ValueError("it holds half a surrogate pair or a NUL, which is no text; send it as UTF-8")
        return (text or "").strip() or None


@dataclass
class Given:
    """An answer that was given: the question, the answer in it (None without one), the model, and the episode as a record."""

    question: str
    answer: str | None
    model: str
    version: str
    episode: Mapping[str, Any]
    said: list[Json] = field(default_factory=list[Json])


def feedback_folder(workspace: Workspace) -> Path:
    """Return the folder with the journal of verdicts and the questions made of it."""
    return workspace.root / "artifacts" / "agent"


class Feedback:
    """Takes verdicts on the last answers of a service. `take` may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts = {"up": 0, "down": 0}
        self._given: OrderedDict[str, Given] = OrderedDict()
        self._last: dict[str, Json] = {}
        self._read_to = 0
        # Two locks: whoever remembers an answer must not wait for the disk.
        self._giving, self._writing = threading.Lock(), threading.Lock()

    def remember(self, identifier: str, given: Given) -> None:
        """Let an answer be judged, under the number in its id; the oldest one is forgotten for it."""
        with self._giving:
            self._given[identifier] = given
            while len(self._given) > KEPT:
                self._given.popitem(last=False)

    def take(self, request: FeedbackRequest) -> Json:
        """Keep a verdict; return what its sender is told. Raises UnknownAnswer, ConfigError for too many, OSError of a full disk."""
        # resp_ID and chatcmpl-ID name the same answer.
        identifier = request.response_id.rpartition("_" if request.response_id.startswith("resp_") else "-")[2]
        with self._giving:
            given = self._given.get(identifier)
        if given is None:
            raise UnknownAnswer(
                f"response_id={request.response_id!r} is none of the last {KEPT:,} answers of this service; send the id of one of them"
            )
        said: Json = {"verdict": request.verdict, "comment": request.comment, "answer": request.answer}
        with self._writing:
            if not given.said or given.said[-1] != said:
                self._keep(identifier, given, said)
            # Also for a verdict that is sent again: the first time the disk may have taken the journal's line alone.
            self._write_questions()
        reply = {"object": "feedback", "response_id": request.response_id, "verdict": request.verdict}
        return {**reply, "question": _golden(said, given.answer) is not None}

    def _keep(self, identifier: str, given: Given, said: Json) -> None:
        if len(given.said) >= _CHANGES:
            raise ConfigError(f"this answer was judged {_CHANGES} times, which is the most; ask again and judge the new answer")
        about = {"question": given.question, "given_answer": given.answer, "model": given.model, "version": given.version}
        # The episode once an answer: MLflow's trace is made of it.
        line = {"time": round(time.time(), 3), "id": identifier, **said, **about, "episode": None if given.said else given.episode}
        json_lines.append(self.folder / JOURNAL, line, sync=True, private=True)
        given.said.append(said)
        self.counts[str(said["verdict"])] += 1

    def _write_questions(self) -> None:
        """Write the questions anew where the journal has grown; only what is new in it is read."""
        with (self.folder / _LOCK).open("a") as lock:
            # Another service must not put questions of fewer verdicts in the place of these.
            fcntl.flock(lock, fcntl.LOCK_EX)
            new = json_lines.read(self.folder / JOURNAL, self._read_to)
            if not new:
                return
            self._last |= last_verdicts(record for _, record in new)
            made = rows(self._last.values())
            write_private(self.folder / QUESTIONS, b"".join(map(json_lines.to_line, made)).decode())
            # Only now: a disk that took no questions is asked again with the same verdicts.
            self._read_to = new[-1][0]


class Delivery:
    """Passes verdicts on in the background by `deliver`, which may take long and may fail: then it is called again, ever more rarely."""

    def __init__(self, deliver: Callable[[], object], folder: Path, pause_s: float = _PAUSE_S) -> None:
        self._deliver, self._pause_s = deliver, pause_s
        self._due = asyncio.Event()
        if (folder / JOURNAL).is_file():
            # An earlier service may have kept what it could not pass on.
            self._due.set()
        self.failures = 0

    async def __aenter__(self) -> Self:
        """Begin."""
        self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End; what was not passed on is, by the next service."""
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)

    def ask(self) -> None:
        """Let what was kept be passed on soon."""
        self._due.set()

    async def _work(self) -> None:
        pause_s = self._pause_s
        while await self._due.wait():
            # Several verdicts go out by one call.
            await asyncio.sleep(pause_s)
            # Before the call and not after it: a verdict that comes meanwhile asks for another call.
            self._due.clear()
            try:
                await asyncio.to_thread(self._deliver)
            except Exception as error:  # noqa: BLE001 - the boundary: nobody waits for this task, so nobody would hear of its end
                self.failures += 1
                if pause_s == self._pause_s:
                    _LOG.warning("verdicts are kept and not passed on yet: %s", error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                self._due.set()
            else:
                pause_s = self._pause_s


def rows(journal: Iterable[Any]) -> list[Json]:
    """Return the questions that verdicts make, in the form that `data.source=folder` reads.

    The last verdict on an answer counts. A question that several answers were judged for is one row with every answer held right.
    """
    questions: dict[str, Json] = {}
    for record in last_verdicts(journal).values():
        golden = _golden(record, record.get("given_answer"))
        if golden is None:
            continue
        facts = {"source": "feedback", "verdict": record["verdict"], "model": record.get("model"), "time": record.get("time")}
        new: Json = {"id": f"feedback-{record['id']}", "question": record["question"], "golden_answers": [], "metadata": facts}
        row = questions.setdefault(str(record["question"]), new)
        if golden not in row["golden_answers"]:
            row["golden_answers"].append(golden)
    return list(questions.values())


def last_verdicts(journal: Iterable[Any]) -> dict[str, Json]:
    """Return by the answer's id the last verdict on it, without the episode. What is no verdict is passed over."""
    last: dict[str, Json] = {}
    for record in journal:
        if isinstance(record, dict) and {"id", "question", "verdict"} <= cast(Json, record).keys():
            verdict = {name: value for name, value in cast(Json, record).items() if name != "episode"}
            last[str(verdict["id"])] = verdict
    return last


def _golden(said: Mapping[str, Any], given: str | None) -> str | None:
    """Return the answer that a verdict holds right: the user's own, else the given one where it was praised."""
    return said.get("answer") or (given if said["verdict"] == "up" else None)
