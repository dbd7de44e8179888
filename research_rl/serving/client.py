"""An engine behind HTTP: token ids in, token ids out. Knows vLLM's completions and SGLang's native wire format.

Invariants: (1) ids the server produced are returned as they are, never decoded and encoded again; (2) a request is
tried again only after a failure that may pass; (3) all sampling parameters are sent, so that defaults of a server or of
a model folder change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Self, cast

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential

from research_rl.episode.agent import Completion
from research_rl.errors import ModelError, ServiceError
from research_rl.process.proxies import httpx_options
from research_rl.process.server_events import data_of
from research_rl.process.services import Endpoint

__all__ = ["EngineName", "HttpEngine", "Pieces", "Sampling", "parse_sglang", "parse_vllm", "render_sglang", "render_vllm"]

Body = dict[str, Any]
EngineName = Literal["vllm", "sglang"]
# Timeouts, a busy or starting server, a gateway that misses its server; any other refusal would come again.
_TRANSIENT = frozenset({408, 425, 429, 502, 503, 504})
_PROBE_S = 2.0
_PAUSE = wait_exponential(multiplier=0.5)
"""0.5, 1 and 2 s: a server that is overloaded is not asked again at once by every episode."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; `seed` makes each drawn continuation a function of its prompt."""

    temperature: float = 0.0
    seed: int = 0
    logprobs: bool = False


class HttpEngine:
    """`research_rl.episode.agent.Engine` over a served model. Use it as an async context manager, within one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        sampling: Sampling,
        *,
        engine: EngineName = "vllm",
        timeout_s: float = 300.0,
        attempts: int = 4,
        connections: int = 64,
    ) -> None:
        self._endpoint, self._sampling, self._attempts = endpoint, sampling, attempts
        self._engine: EngineName = engine
        self._client = httpx.AsyncClient(
            # SGLang's own interface lies beside /v1, not below it.
            base_url=endpoint.url.removesuffix("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            **httpx_options(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        """Continue `prompt_ids` by at most `max_tokens` tokens. Raises ServiceError, and ModelError for ids the model does not have."""
        self._require_known(prompt_ids)
        if self._engine == "sglang":
            return parse_sglang(await self._post("/generate", render_sglang(prompt_ids, stop, max_tokens, self._sampling)), stop)
        body = render_vllm(prompt_ids, stop, max_tokens, self._sampling, self._endpoint.model or "")
        return parse_vllm(await self._post("/v1/completions", body), stop)

    async def stream(
        self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, on_ids: Callable[[Sequence[int]], None]
    ) -> Completion:
        """As `generate`; `on_ids` is called with each piece of the ids as it comes. Raises as `generate`."""
        self._require_known(prompt_ids)
        if self._engine == "sglang":
            path, body = "/generate", render_sglang(prompt_ids, stop, max_tokens, self._sampling)
        else:
            path, body = "/v1/completions", render_vllm(prompt_ids, stop, max_tokens, self._sampling, self._endpoint.model or "")
        pieces = Pieces(self._engine, stop)
        async with aclosing(self._streamed(path, body | {"stream": True})) as messages:
            async for message in messages:
                if new := pieces.take(message):
                    on_ids(new)
        return pieces.completion()

    def _require_known(self, ids: Sequence[int]) -> None:
        """Raise ModelError for an id past the model's tokens: one such id ends SGLang's whole server, with all that it is writing."""
        rows = self._endpoint.vocabulary
        if rows is not None and (unknown := next((token for token in ids if not 0 <= token < rows), None)) is not None:
            raise ModelError(f"token id {unknown} is none of the {rows:,} of {self._endpoint.model}; take the tokenizer of this model")

    async def works(self) -> bool:
        """Whether the server says that it is healthy."""
        try:
            return (await self._client.get("/health", timeout=_PROBE_S)).is_success
        except httpx.HTTPError:
            return False

    async def _streamed(self, path: str, body: Body) -> AsyncGenerator[Mapping[str, Any]]:
        """Yield the messages of a streamed reply; ask again only while none has come. Raises ServiceError."""
        begun = False
        async for attempt in self._tries(path):
            with attempt:
                try:
                    async with self._client.stream("POST", path, json=body) as reply:
                        if not reply.is_success:
                            self._refuse(path, reply.status_code, (await reply.aread()).decode(errors="replace"))
                        async for data in data_of(reply.aiter_bytes()):
                            begun = True
                            yield _message(data)
                        return
                except httpx.TransportError as error:
                    failure = _Passing(f"{type(error).__name__}: {error}")
                    # What came was shown; a second reply could differ from it.
                    if begun:
                        raise ServiceError(f"{self._client.base_url} broke off within a turn: {failure}; see the server's log") from None
                    raise failure from None

    async def _post(self, path: str, body: Body) -> Mapping[str, Any]:
        """Return the object of a reply. Raises ServiceError."""

        async def ask() -> Mapping[str, Any]:
            try:
                reply = await self._client.post(path, json=body)
            except httpx.TransportError as error:
                raise _Passing(f"{type(error).__name__}: {error}") from None
            if not reply.is_success:
                self._refuse(path, reply.status_code, reply.text)
            return reply.json()

        return await self._tries(path)(ask)

    def _tries(self, path: str) -> AsyncRetrying:
        """Return what tries again after a failure that may pass; the last one becomes a ServiceError."""

        def give_up(state: RetryCallState) -> NoReturn:
            failure = state.outcome and state.outcome.exception()
            raise ServiceError(
                f"{self._client.base_url} failed {self._attempts} times at {path}, last: {failure}; see the server's log"
            ) from None

        return AsyncRetrying(
            retry=retry_if_exception_type(_Passing), stop=stop_after_attempt(self._attempts), wait=_PAUSE, retry_error_callback=give_up
        )

    def _refuse(self, path: str, status: int, text: str) -> NoReturn:
        """Raise _Passing for a refusal that may not come again, else ServiceError."""
        failure = f"HTTP {status}: {text[:300]}"
        if status in _TRANSIENT:
            raise _Passing(failure)
        raise ServiceError(f"{self._client.base_url} refused {path}: {failure}")


class _Passing(Exception):
    """The server could not be reached, or cannot answer now."""


def _message(data: str) -> Mapping[str, Any]:
    """Read one message of a streamed reply. Raises ServiceError for what is no object, and for an error that the server tells."""
    try:
        message: Any = json.loads(data)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise ServiceError(f"the server streamed {data[:80]!r}, which is no JSON object; name a server of vLLM or SGLang")
    if error := cast(dict[str, Any], message).get("error"):
        raise ServiceError(f"the server failed within a turn: {str(error)[:300]}; see its log")
    return cast(dict[str, Any], message)


@dataclass
class Pieces:
    """A completion that arrives in pieces, in the format of `engine`; `stop` is what was asked to end it."""

    engine: EngineName
    stop: Sequence[str]
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float | None] = field(default_factory=list[float | None])
    finish: str | None = None
    matched: int | str | None = None

    def take(self, message: Mapping[str, Any]) -> Sequence[int]:
        """Add a message; return its new ids. Raises ServiceError for a server that streams no ids."""
        return self._sglang(message) if self.engine == "sglang" else self._vllm(message)

    def completion(self) -> Completion:
        """Return the whole. Raises ServiceError when the stream ended without saying why the turn did."""
        if self.finish is None:
            raise ServiceError(f"the server's stream ended after {len(self.ids)} tokens without a finish_reason; see its log")
        logprobs = self.logprobs if any(value is not None for value in self.logprobs) else None
        return _completion(self.ids, logprobs, self.finish, self.matched, self.stop)

    def _vllm(self, message: Mapping[str, Any]) -> Sequence[int]:
        # A message about usage alone has no choice.
        for choice in message.get("choices") or ():
            new: list[int] = _token_ids(choice)
            self.ids += new
            values = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else [None] * len(new)
            self.logprobs += values
            self.finish, self.matched = choice.get("finish_reason") or self.finish, choice.get("stop_reason") or self.matched
            return new
        return ()

    def _sglang(self, message: Mapping[str, Any]) -> Sequence[int]:
        meta = message["meta_info"]
        tokens, known = meta["output_token_logprobs"], len(self.ids)
        # All tokens so far, or only the new ones where the server was started with --incremental-streaming-output, as ours is.
        new = tokens[known:] if len(tokens) >= meta["completion_tokens"] else tokens
        self.ids += [token[1] for token in new]
        self.logprobs += [token[0] for token in new]
        if finish := meta.get("finish_reason"):
            self.finish, self.matched = finish["type"], finish.get("matched")
        return self.ids[known:]


def _token_ids(choice: Mapping[str, Any]) -> list[int]:
    # Older servers ignore `return_token_ids` without an error.
    ids = choice.get("token_ids")
    if ids is None:
        raise ServiceError("the server returned no token_ids; serve the model with vLLM 0.10.2 or newer, or with SGLang")
    return ids


def render_vllm(prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, sampling: Sampling, model: str) -> Body:
    """Return the body of POST /v1/completions."""
    return {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": max_tokens,
        "stop": list(stop),
        # The ids of </search> belong to the response that is trained on.
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        # 0 asks for the log-probability of the drawn token alone.
        "logprobs": 0 if sampling.logprobs else None,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        # vLLM's value for no limit; SGLang's is -1.
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": _seed(prompt_ids, sampling),
    }


def parse_vllm(reply: Mapping[str, Any], stop: Sequence[str]) -> Completion:
    """Read a completions reply: `stop_reason` is the stop string, or null (or a token id) at the end of the sequence."""
    choice = reply["choices"][0]
    values = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None
    return _completion(_token_ids(choice), values, choice["finish_reason"], choice.get("stop_reason"), stop)


def render_sglang(prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, sampling: Sampling) -> Body:
    """Return the body of POST /generate, which takes and gives ids."""
    parameters: Body = {
        "max_new_tokens": max_tokens,
        "stop": list(stop),
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "sampling_seed": _seed(prompt_ids, sampling),
    }
    return {"input_ids": list(prompt_ids), "sampling_params": parameters, "return_logprob": True, "stream": False}


def parse_sglang(reply: Mapping[str, Any], stop: Sequence[str]) -> Completion:
    """Read a reply of /generate: ids and log-probabilities stand together in `output_token_logprobs`."""
    meta = reply["meta_info"]
    tokens = meta["output_token_logprobs"]
    finish = meta["finish_reason"]
    return _completion([token[1] for token in tokens], [token[0] for token in tokens], finish["type"], finish.get("matched"), stop)


def _completion(
    ids: Sequence[int], logprobs: Sequence[float | None] | None, finish: str | None, matched: int | str | None, stop: Sequence[str]
) -> Completion:
    values = tuple(value or 0.0 for value in logprobs) if logprobs is not None else (0.0,) * len(ids)
    if len(values) != len(ids):
        raise ServiceError(f"the server returned {len(ids)} ids and {len(values)} log-probabilities; one each is needed")
    if finish == "length":
        return Completion(tuple(ids), values, "length")
    # SGLang ends a sequence whose numbers broke as if it had met a stop string: "NaN happened".
    if finish == "stop" and isinstance(matched, str) and matched not in stop:
        raise ServiceError(f"the server ended a sequence at {matched!r:.80}, which is no stop string of {list(stop)}; see its log")
    if finish == "stop":
        # A stop string matched as text; a matched token id is one of the model's ends of sequence.
        return Completion(tuple(ids), values, "stop" if isinstance(matched, str) else "eos")
    raise ServiceError(f"the server ended a sequence with finish_reason={finish!r}; stop or length is needed")


def _seed(prompt_ids: Sequence[int], sampling: Sampling) -> int | None:
    if sampling.temperature == 0:
        return None
    digest = hashlib.blake2b(f"{sampling.seed}:{','.join(map(str, prompt_ids))}".encode(), digest_size=4).digest()
    # 31 bits, which a signed 32-bit seed holds.
    return int.from_bytes(digest) >> 1
