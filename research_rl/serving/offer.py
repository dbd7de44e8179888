"""What a model server offers that runs already. Knows /v1/models of vLLM and SGLang, and SGLang's /model_info; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from research_rl.errors import ServiceError
from research_rl.process.proxies import httpx_options
from research_rl.process.tokens import token_from

__all__ = ["TOKEN_VARIABLE", "Offer", "base", "offers", "weights_path"]

TOKEN_VARIABLE = "RESEARCH_SERVING_TOKEN"
_WAIT_S = 10.0
_INFO = ("/model_info", "/get_model_info")
"""SGLang's own description of its model: its newer versions warn of the second name, the older ones know no other."""


@dataclass(frozen=True)
class Offer:
    """One model of a server: where, under which name, by which engine, from which folder or repository, its longest sequence in tokens.

    `context` is None where the server does not say it.
    """

    url: str
    model: str
    engine: Literal["vllm", "sglang"]
    root: str
    context: int | None


def base(url: str) -> str:
    """Return the address below which /v1 lies."""
    return url.removesuffix("/").removesuffix("/v1")


def offers(url: str, token: str | None = None) -> list[Offer]:
    """Return what the server at `url` has, asked with `token` or else with RESEARCH_SERVING_TOKEN. Raises ServiceError."""
    where = base(url)
    try:
        return [_offer(where, each) for each in _get(where, "/v1/models", token).raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{where} does not answer /v1/models ({error}); start vLLM or SGLang there, or name another server") from None


def weights_path(offer: Offer) -> str:
    """Return from where a server read the weights: a folder of its machine or a repository. Raises ServiceError."""
    # In the place of this, SGLang's /v1/models gives the model's name once more.
    if offer.engine != "sglang":
        return offer.root
    try:
        replies = (_get(offer.url, path, None) for path in _INFO)
        about = next((reply.json() for reply in replies if reply.is_success), {})
        return str(about.get("model_path") or offer.root)
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        raise ServiceError(f"{offer.url} does not answer {' or '.join(_INFO)} ({error}); look at its log") from None


def _get(where: str, path: str, token: str | None) -> httpx.Response:
    token = token or token_from(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    reply = httpx.get(f"{where}{path}", headers=headers, timeout=_WAIT_S, **httpx_options())
    if reply.status_code in (401, 403):
        raise ServiceError(f"{where} refuses the token (HTTP {reply.status_code}); set {TOKEN_VARIABLE} to the server's")
    return reply


def _offer(where: str, said: Mapping[str, Any]) -> Offer:
    name, context = str(said["id"]), said.get("max_model_len")
    # SGLang says `sglang`; vLLM and whoever speaks its format say their own.
    engine = "sglang" if said.get("owned_by") == "sglang" else "vllm"
    return Offer(where, name, engine, str(said.get("root") or name), context if isinstance(context, int) else None)
