"""Which proxy a request goes through, and whose certificates it trusts: a configured proxy or none, never one that the environment names.

Sends nothing.

HTTP_PROXY and its like belong to a shell, not to a run, and the proxy of a plain http request reads its headers, tokens included. So every
client of this package takes its options here. Libraries with clients of their own (Prefect, MLflow, DVC) read the environment; for
them traffic to this machine is kept away from any proxy. The certificates of SSL_CERT_FILE or SSL_CERT_DIR count for all: a service behind
a proxy with TLS often has one of the house's own authority.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import ssl
import urllib.request
from collections.abc import Mapping
from typing import TypedDict

from research_rl.errors import ServiceError

__all__ = ["LOOPBACK", "HttpxOptions", "botocore_options", "bypass_loopback", "environment_options", "httpx_options", "require_usable"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class HttpxOptions(TypedDict):
    """The options of an httpx client or request that decide its proxy and its certificates."""

    trust_env: bool
    proxy: str | None
    verify: ssl.SSLContext | bool


def httpx_options(proxy: str | None = None, *, url: str = "https:") -> HttpxOptions:
    """Return the options for httpx: through `proxy`, else straight to the server. With a plain http `url` no certificates are read."""
    encrypted = "https:" in url.lower() or proxy is not None
    names = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    return {"trust_env": False, "proxy": proxy, "verify": _trusted(*names) if encrypted else False}


@functools.cache
def _trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Return one context for all clients: reading the system's certificates takes as long as a hundred searches."""
    import httpx

    return httpx.create_ssl_context()


def environment_options() -> HttpxOptions:
    """Return the options for httpx by which a library's own client goes, to ask without a token whether it will reach its server."""
    return {"trust_env": True, "proxy": None, "verify": True}


def botocore_options(proxy: str | None = None) -> dict[str, dict[str, str]]:
    """Return the options for botocore's Config: through `proxy`, else straight to the server.

    A mapping without entries must be given too: without it botocore reads the environment.
    """
    return {"proxies": {"http": proxy, "https": proxy} if proxy else {}}


def bypass_loopback(env: Mapping[str, str]) -> dict[str, str]:
    """Return NO_PROXY, in both spellings that clients read, with loopback added to what `env` names."""
    names = [name.strip() for spelling in ("no_proxy", "NO_PROXY") for name in env.get(spelling, "").split(",")]
    merged = ",".join(dict.fromkeys(filter(None, [*names, *LOOPBACK])))
    return {"NO_PROXY": merged, "no_proxy": merged}


def require_usable() -> None:
    """Raise ServiceError for a SOCKS proxy that httpx cannot use: it fails to make any client then, also one for loopback."""
    for kind, address in urllib.request.getproxies().items():
        scheme = address.partition("://")[0]
        # `getproxies` lists NO_PROXY as one more kind.
        if kind != "no" and scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise ServiceError(
                f"{kind.upper()}_PROXY names a {scheme} proxy, for which the package socksio is missing; "
                "run `pip install socksio`, name an HTTP proxy, or unset the variable"
            )
