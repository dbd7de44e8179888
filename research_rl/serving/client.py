"""An engine behind HTTP: token ids in, token ids out. Knows vLLM's completions and SGLang's native wire format.

Invariants: (1) ids the server produced are returned as they are, never decoded and encoded again; (2) a request is
tried again only after a failure that may pass; (3) all sampling parameters are sent, so that defaults of a server or of
a model folder change nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import httpx

from research_rl.episode.agent import Completion
from research_rl.errors import ServiceError
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Endpoint

__all__ = ["HttpEngine", "Sampling", "parse_sglang", "parse_vllm", "render_sglang", "render_vllm"]

Body = dict[str, Any]
# Timeouts, a busy or starting server, a gateway that misses its server; any other refusal would come again.
_TRANSIENT = frozenset({408, 425, 429, 502, 503, 504})


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
        engine: Literal["vllm", "sglang"] = "vllm",
        timeout_s: float = 300.0,
        attempts: int = 4,
        connections: int = 64,
    ) -> None:
        self._endpoint, self._sampling, self._attempts, self._engine = endpoint, sampling, attempts, engine
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
        """Continue `prompt_ids` by at most `max_tokens` tokens. Raises ServiceError."""
        if self._engine == "sglang":
            return parse_sglang(await self._post("/generate", render_sglang(prompt_ids, stop, max_tokens, self._sampling)))
        body = render_vllm(prompt_ids, stop, max_tokens, self._sampling, self._endpoint.model or "")
        return parse_vllm(await self._post("/v1/completions", body))

    async def _post(self, path: str, body: Body) -> Mapping[str, Any]:
        failure = ""
        for attempt in range(self._attempts):
            if attempt:
                # 0.5, 1 and 2 s: a server that is overloaded is not asked again at once by every episode.
                await asyncio.sleep(0.25 * 2**attempt)
            try:
                reply = await self._client.post(path, json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if reply.is_success:
                return reply.json()
            failure = f"HTTP {reply.status_code}: {reply.text[:300]}"
            if reply.status_code not in _TRANSIENT:
                raise ServiceError(f"{self._client.base_url} refused {path}: {failure}")
        raise ServiceError(f"{self._client.base_url} failed {self._attempts} times at {path}, last: {failure}; see the server's log")


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


def parse_vllm(reply: Mapping[str, Any]) -> Completion:
    """Read a completions reply: `stop_reason` is the stop string, or null (or a token id) at the end of the sequence."""
    choice = reply["choices"][0]
    # Older servers ignore `return_token_ids` without an error.
    ids = choice.get("token_ids")
    if ids is None:
        raise ServiceError("the server returned no token_ids; serve the model with vLLM 0.10.2 or newer, or with SGLang")
    values = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None
    return _completion(ids, values, choice["finish_reason"], choice.get("stop_reason"))


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


def parse_sglang(reply: Mapping[str, Any]) -> Completion:
    """Read a reply of /generate: ids and log-probabilities stand together in `output_token_logprobs`."""
    meta = reply["meta_info"]
    tokens = meta["output_token_logprobs"]
    finish = meta["finish_reason"]
    return _completion([token[1] for token in tokens], [token[0] for token in tokens], finish["type"], finish.get("matched"))


def _completion(ids: Sequence[int], logprobs: Sequence[float | None] | None, finish: str | None, matched: int | str | None) -> Completion:
    values = tuple(value or 0.0 for value in logprobs) if logprobs is not None else (0.0,) * len(ids)
    if len(values) != len(ids):
        raise ServiceError(f"the server returned {len(ids)} ids and {len(values)} log-probabilities; one each is needed")
    if finish == "length":
        return Completion(tuple(ids), values, "length")
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
