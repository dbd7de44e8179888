"""Proxies of the environment: traffic to this machine never goes through one. Knows variables only. Standard library only."""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Mapping

from research_rl.errors import ServiceError

__all__ = ["LOOPBACK", "bypass_loopback", "require_usable"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
