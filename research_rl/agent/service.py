"""The HTTP application of the agent: OpenAI's two formats, a page, and what operators ask. Knows requests and limits; plays no episode.

Invariants: (1) a request that cannot be answered is refused before an episode begins, with value, limit and remedy; (2) at most
`agent.concurrency` episodes run, and each ends with its client; (3) a stream ends with an event that says how the episode ended, also
when the model server failed or the service has a fault; (4) what was accepted before the service drains is answered, or told after
`agent.drain_s` that it is not; (5) no question is logged unless asked for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar, cast

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research_rl import __version__
from research_rl.agent import answering, page
from research_rl.agent.answering import Backend, Ending, Finished, Lease, Part, Thought, Words
from research_rl.agent.chat import Chat
from research_rl.agent.connection import EventStream, body_of, unless_gone
from research_rl.agent.feedback import Delivery, Feedback, FeedbackRequest, Given, UnknownAnswer
from research_rl.agent.observe import AgentMetrics
from research_rl.agent.requests import ChatRequest, ResponsesRequest
from research_rl.agent.responses import Response as ResponseObject
from research_rl.agent.rounds import rounds
from research_rl.agent.shadow import AnsweredQuestion, Shadow
from research_rl.agent.standing import Standing
from research_rl.config import AgentConfig, Config
from research_rl.episode.agent import Limits
from research_rl.errors import ResearchError
from research_rl.process.access import Access, Guard, Refused, bearer
from research_rl.process.proxies import LOOPBACK

__all__ = ["ALIAS", "AgentService", "BackendSource", "Refusal", "access"]

ALIAS = "research-agent"
"""A name for whichever policy is served; the other one changes with every training."""
# Load balancers ask each service many times a second; the servers behind it are asked once a second at most.
_PROBED_S, _PROBE_EVERY_S = 1.0, 10.0
_ENDS = "the service ends before the answer does; ask again"
_LOG = logging.getLogger("research_rl.agent")
_Request = TypeVar("_Request", ResponsesRequest, ChatRequest)
_Body = TypeVar("_Body", ResponsesRequest, ChatRequest, FeedbackRequest)
Wire = ResponseObject | Chat
Wires = Callable[[str, str, _Request, Limits, dict[str, Any]], Wire]
"""Makes the form in which a question is told, of its id, the model's name, the request, its limits, and what else is told."""


class BackendSource(Protocol):
    """Where the service takes what it answers with: open while the service runs."""

    async def __aenter__(self) -> Self:
        """Open it."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        ...

    @property
    def backend(self) -> Backend:
        """What the next question is answered with."""
        ...

    def lease(self) -> Lease:
        """Return the same for one question, whose model is kept until the question is over."""
        ...

    def standing(self) -> Standing:
        """Return what is served, and since when."""
        ...

    async def trouble(self) -> str | None:
        """Return why no question can be answered now; None when one can."""
        ...


class Refusal(Exception):
    """A request that is not answered: `reason` is a word for counters, `text` is for its sender."""

    def __init__(self, status: int, reason: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.reason, self.text, self.headers = status, reason, text, dict(headers or {})

    def response(self) -> Response:
        """Return the answer, in the form in which OpenAI's servers refuse."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        error = {"message": self.text, "type": kind, "param": None, "code": self.reason}
        return _json({"error": error}, self.status, self.headers)


def access(config: AgentConfig, token: str | None) -> Access:
    """Return who may ask: whoever sends `token`, from a name, page and network that the settings allow. Files of the page are open."""
    return Access(
        (config.host, *config.hosts),
        outside=config.host not in LOOPBACK,
        networks=[ipaddress.ip_network(network, strict=False) for network in config.allow],
        content_types=("application/json",),
        authorization=bearer(token) if token and config.auth == "token" else None,
        open_paths=("/health", "/readyz", *page.PATHS),
        remedies={
            "host": "add it to agent.hosts or use its address",
            "network": "add its network to agent.allow",
            "token": "send the token of the service, which its first line of output says where to find",
        },
    )


@dataclass
class _Asked:
    """One question on its way: what is played, how it is told, and what is noted of it."""

    identifier: str
    route: str
    question: str
    lease: Lease
    prompt: list[int]
    limits: Limits
    wire: Wire
    streams: bool
    began: float = field(default_factory=time.monotonic)
    finished: Finished | None = None
    has_text: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class AgentService:
    """The application and its state. `app` is what a server runs; `log` gets a line of facts for each question."""

    def __init__(
        self,
        source: BackendSource,
        config: Config,
        token: str | None,
        log: Callable[[dict[str, Any]], None] = lambda _: None,
        feedback: Feedback | None = None,
        shadow: Shadow | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self.config, self.draining = config.agent, False
        self.feedback, self.shadow, self._delivery = feedback, shadow, delivery
        self.metrics = AgentMetrics(lambda: self.active, lambda: not self.draining and not self._trouble[1], source.standing, self._counts)
        self.active = 0
        """Questions being answered."""
        self.requests = 0
        """Requests being answered, those refused among them."""
        self._source, self._limits, self._log = source, Limits(**config.episode.model_dump()), log
        self._trouble: tuple[float, str | None] = (float("-inf"), None)
        self._probing = asyncio.Lock()
        self._names: set[str] = set()
        self._running: set[Ending] = set()
        # FastAPI's own pages of documentation load their scripts from a public host.
        application = FastAPI(title="research-rl agent", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None)
        application.exception_handler(Refusal)(self._refused)
        application.exception_handler(HTTPException)(self._unknown)
        application.exception_handler(Exception)(self._unforeseen)
        _add_status(application, self)
        _add_questions(application, self)
        _add_feedback(application, self)
        page.add(application)
        # The guard is outermost: what it refuses is neither read nor counted among the requests for which draining waits.
        self.app: ASGIApp = Guard(_Counted(application, self), access(config.agent, token), self._unwelcome)

    def drain(self) -> None:
        """Refuse new questions from now on."""
        self.draining = True

    def cut(self) -> None:
        """End the episodes that still run, as failures, so that their clients are told."""
        # `end` only sets an event, so the set stays as it is until this loop is over.
        for episode in self._running:
            episode.end()

    async def trouble(self) -> str | None:
        """Return why no question can be answered now; what was asked for a moment ago is not asked for again."""
        if self.draining:
            return "draining"
        # Whoever asks meanwhile waits for the same answer.
        async with self._probing:
            if time.monotonic() - self._trouble[0] > _PROBED_S:
                reason = await self._source.trouble()
                self._trouble = (time.monotonic(), reason)
        return self._trouble[1]

    @property
    def models(self) -> list[str]:
        """The names under which the policy is asked for. The lasting one is the first, which many clients take."""
        name = self._source.backend.model
        self._names.add(name)
        return [ALIAS, name]

    def _serves(self, name: str) -> bool:
        """Return whether a request may name this model: also one that an earlier answer named, whose place another has taken."""
        return name in self.models or name in self._names

    def info(self) -> dict[str, Any]:
        """Return what operators are told: the model in service, since when, what failed last, and how the challenger does."""
        return {**self._source.standing().to_json(), "challenger": self.shadow.facts() if self.shadow else None}

    async def judge(self, http: Request) -> Response:
        """Take a verdict on an answer. Raises Refusal."""
        if self.feedback is None:
            raise Refusal(404, "path", "this service takes no feedback; ask one that `research serve-agent` started")
        request = await self._read(http, FeedbackRequest)
        try:
            reply = await asyncio.to_thread(self.feedback.take, request)
        except UnknownAnswer as error:
            raise Refusal(404, "response_not_found", str(error)) from None
        except ResearchError as error:
            raise Refusal(400, "feedback", str(error)) from None
        except OSError as error:
            _LOG.error("%s takes no verdict: %s; free disk space", self.feedback.folder, error.strerror)
            raise Refusal(503, "disk", "the verdict could not be kept: the service's disk is full or fails; send it later") from None
        if self._delivery:
            self._delivery.ask()
        return _json(reply)

    async def ask(self, http: Request, kind: type[_Request], wire: Wires[_Request]) -> Response:
        """Answer a request of one of the two formats. Raises Refusal."""
        if self.draining:
            raise Refusal(503, "draining", "the service ends; ask again in 5 s, when another may run", {"Retry-After": "5"})
        # Before the body is read: a service that is full spends nothing on more.
        self._require_place()
        request = await self._read(http, kind)
        if request.model is not None and not self._serves(request.model):
            names = " and ".join(self.models)
            raise Refusal(404, "model_not_found", f"model={request.model[:80]!r} is not served; ask for one of {names}")
        # From here on the question has its model, whatever the next one is answered with.
        lease = self._source.lease()
        try:
            asked = await self._asked(http.url.path, request, lease, wire)
            # Once more: others may have come while the prompt was made.
            self._require_place()
        # A cancelled request, too: a lease that nobody ends would keep its model loaded until `agent.drain_s` is over.
        except BaseException:
            lease.end()
            raise
        # Nothing is awaited between the last look at the places and this, so no other question takes the same place.
        self.active += 1
        return await self._answer(http, asked)

    def _require_place(self) -> None:
        if self.active >= self.config.concurrency:
            seconds = self.metrics.free_in_s(self.config.concurrency)
            text = f"{self.active} questions are being answered, the limit is agent.concurrency={self.config.concurrency}"
            raise Refusal(429, "full", f"{text}; ask again in {seconds} s", {"Retry-After": str(seconds)})

    async def _read(self, http: Request, kind: type[_Body]) -> _Body:
        body = await body_of(http, self.config.max_body_kib << 10)
        if body is None:
            limit = f"agent.max_body_kib={self.config.max_body_kib}"
            raise Refusal(413, "size", f"the body is larger than {limit} or came too slowly; send a shorter conversation")
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, p['loc'])) or 'body'}={str(p.get('input'))[:80]}: {p['msg']}" for p in error.errors()[:5]]
            raise Refusal(400, "format", "; ".join(problems)) from None

    async def _asked(self, route: str, request: _Request, lease: Lease, wire: Wires[_Request]) -> _Asked:
        identifier = secrets.token_hex(12)
        try:
            question, others = request.question(self.config.max_question_chars)
            limits = request.limits(self._limits)
            # In a thread: a chat template is rendered in another process, which may take a second.
            prompt = list(await asyncio.to_thread(lease.backend.encode, question))
        except ResearchError as error:
            raise Refusal(400, "question", str(error)) from None
        response = wire(identifier, lease.backend.model, request, limits, {"ignored_messages": others})
        return _Asked(identifier, route, question, lease, prompt, limits, response, bool(request.stream))

    async def _answer(self, http: Request, asked: _Asked) -> Response:
        if asked.streams:
            # The stream frees the place itself: it begins only after this method has returned.
            return EventStream(lambda: self._events(asked), lambda: self._over(asked))
        try:
            finished = await unless_gone(http.receive, self._whole(asked))
        finally:
            self._over(asked)
        # The status is for the log alone: nobody reads this answer.
        return _json(asked.wire.object, 502 if asked.wire.failed else 200) if finished else Response(status_code=499)

    async def _events(self, asked: _Asked) -> AsyncGenerator[bytes]:
        """Yield the stream of server-sent events of one question."""
        for event in asked.wire.begin():
            yield _sent(event)
        try:
            async with aclosing(self._parts(asked)) as parts:
                async for part in parts:
                    events = asked.wire.take(part)
                    # A comment keeps proxies from closing a connection on which nothing comes.
                    yield b"".join(map(_sent, events)) or b": waiting\n\n"
        except Exception:  # noqa: BLE001 - the boundary: a fault of ours is told like one of the model server
            _LOG.exception("question %s failed", asked.identifier)
            self.metrics.refused("error")
            yield b"".join(map(_sent, asked.wire.fail("the question could not be answered; the service's log says why")))
        yield b"data: [DONE]\n\n"

    async def _whole(self, asked: _Asked) -> bool:
        asked.wire.begin()
        async with aclosing(self._parts(asked)) as parts:
            async for part in parts:
                # `unless_gone` returns None for a client that left, so an answer that is whole has to be something else.
                asked.wire.take(part)
        return True

    async def _parts(self, asked: _Asked) -> AsyncGenerator[Part]:
        ending, waiting_s = Ending(asked.lease.backend, _ENDS), self.config.keep_alive_s
        played = answering.answer(ending.backend(), asked.prompt, asked.limits, waiting_s, word_by_word=asked.streams)
        self._running.add(ending)
        try:
            async with aclosing(played) as parts:
                async for part in parts:
                    if isinstance(part, Thought | Words) and not asked.has_text:
                        asked.has_text = True
                        self.metrics.first_text(asked.seconds)
                    if isinstance(part, Finished):
                        asked.finished = part
                    yield part
        finally:
            self._running.discard(ending)

    def _over(self, asked: _Asked) -> None:
        """Free the place of a question and note how it went."""
        self.active -= 1
        asked.lease.end()
        if asked.finished is None:
            self.metrics.gone()
        else:
            self._told(asked, asked.finished)
        if self.config.log_requests:
            self._log(self._line(asked))

    def _told(self, asked: _Asked, finished: Finished) -> None:
        """Note an episode that went to its end: in the counters, for verdicts, and for the challenger."""
        self.metrics.finished(finished, asked.seconds)
        if finished.trajectory.error:
            _LOG.error("question %s: %s", asked.identifier, finished.trajectory.error)
        backend = asked.lease.backend
        if self.feedback:
            episode = finished.trajectory.to_json()
            given = Given(asked.question, finished.answer, backend.model, backend.version, episode)
            self.feedback.remember(asked.identifier, given)
        if self.shadow:
            self.shadow.offer(AnsweredQuestion(asked.identifier, asked.question, asked.limits, backend, finished, asked.seconds))

    def _line(self, asked: _Asked) -> dict[str, Any]:
        """Return the line of the log about a question."""
        finished = asked.finished
        line: dict[str, Any] = {"time": round(time.time(), 3), "id": asked.identifier, "route": asked.route, "stream": asked.streams}
        line |= {"stop": finished.trajectory.stop.value if finished else "gone", "seconds": round(asked.seconds, 3)}
        if finished:
            line |= {"searches": len(finished.trajectory.searches), "read": finished.read_tokens, "written": finished.written_tokens}
            line |= {"supported": finished.supported}
        if self.config.log_questions:
            line |= {"question": asked.question, "answer": finished.answer if finished else None}
        return line

    def _counts(self) -> dict[str, dict[str, int]]:
        """Return the counts of the parts that a service may have: what became of questions offered to a challenger, and verdicts."""
        return {
            "challenged": self.shadow.counts if self.shadow else {},
            "verdicts": self.feedback.counts if self.feedback else {},
        }

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            # The source comes first and so closes last: a challenger searches by the source's client.
            await stack.enter_async_context(self._source)
            for part in (self.shadow, self._delivery):
                if part:
                    await stack.enter_async_context(part)
            probing = asyncio.create_task(rounds("asking the servers", self._probe, _PROBE_EVERY_S, at_once=True))
            stack.callback(probing.cancel)
            yield

    async def _probe(self) -> None:
        # For the metric `agent_ready`, which nobody waits for.
        await self.trouble()

    def _unwelcome(self, refused: Refused) -> None:
        self.metrics.refused(refused.reason)

    async def _refused(self, _: Request, error: Exception) -> Response:
        refusal = cast(Refusal, error)
        self.metrics.refused(refusal.reason)
        return refusal.response()

    async def _unknown(self, request: Request, error: Exception) -> Response:
        status = cast(HTTPException, error).status_code
        served = "/v1/responses, /v1/chat/completions, /v1/feedback and /v1/models"
        text = f"{request.method} {request.url.path[:80]} is not served; {served} are"
        return Refusal(status, "path", text, cast(HTTPException, error).headers).response()

    async def _unforeseen(self, request: Request, error: Exception) -> Response:
        self.metrics.refused("error")
        # Starlette raises the error once more behind this answer, and uvicorn writes it to the log.
        return Refusal(500, "error", "the question could not be answered; the service's log says why").response()


class _Counted:
    """Counts requests, those under way and those answered by status."""

    def __init__(self, app: ASGIApp, service: AgentService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # What nginx logs of a client that left before its answer began.
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # A draining server ends soon: a client must not send its next request on this connection.
                more = [(b"connection", b"close")] if self._service.draining else []
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store"), *more]
            await send(message)

        self._service.requests += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._service.requests -= 1
            self._service.metrics.request(scope["path"], status)


def _add_status(app: FastAPI, service: AgentService) -> None:
    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the process answers; it does so while it drains, too."""
        return _json({"status": "draining" if service.draining else "healthy", "active": service.active})

    @app.get("/readyz")
    async def readyz() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether questions are answered: model server and retriever answer, and the service does not drain."""
        trouble = await service.trouble()
        return _json({"status": trouble or "ready"}, 503 if trouble else 200, {"Retry-After": "5"} if trouble else {})

    @app.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info")
    async def info() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Which model is served, since when, and what failed when another should have been."""
        return _json(service.info())

    @app.get("/v1/models")
    async def models() -> Response:  # pyright: ignore[reportUnusedFunction]
        """The names under which the policy is asked for."""
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "research-rl"} for name in service.models]
        return _json({"object": "list", "data": data})


def _add_questions(app: FastAPI, service: AgentService) -> None:
    # As OpenAI's servers do, an answer names the model that gave it, whatever alias it was asked by.
    def response(identifier: str, model: str, request: ResponsesRequest, limits: Limits, more: dict[str, Any]) -> Wire:
        return ResponseObject(identifier, model, limits, more)

    def chat(identifier: str, model: str, request: ChatRequest, limits: Limits, more: dict[str, Any]) -> Wire:
        return Chat(identifier, model, more, usage=request.usage)

    @app.post("/v1/responses", openapi_extra=_takes(ResponsesRequest))
    async def responses(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Answer in the format of OpenAI's Responses API."""
        return await service.ask(request, ResponsesRequest, response)

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def completions(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Answer in the format of OpenAI's Chat Completions API."""
        return await service.ask(request, ChatRequest, chat)


def _add_feedback(app: FastAPI, service: AgentService) -> None:
    @app.post("/v1/feedback", openapi_extra=_takes(FeedbackRequest))
    async def feedback(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Take a verdict on an answer."""
        return await service.judge(request)


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Return what OpenAPI says of a body that the service reads by itself, to bound it before it is parsed."""
    schema = kind.model_json_schema(ref_template="{model}")
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return a schema with definitions in the place of the references to them, which would not resolve within a larger document."""
    if isinstance(schema, dict):
        node = cast(dict[str, Any], schema)
        return definitions[node["$ref"]] if "$ref" in node else {name: _inlined(each, definitions) for name, each in node.items()}
    return [_inlined(each, definitions) for each in cast(list[Any], schema)] if isinstance(schema, list) else schema


def _sent(event: Mapping[str, Any]) -> bytes:
    # A chunk of a chat has no type, and its stream no names.
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n".encode()


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content).encode(), status, dict(headers or {}), media_type="application/json")
