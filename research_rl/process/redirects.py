"""Where a redirect of a download may lead: from a public host to no internal one, which only this machine may reach. Sends nothing.

Invariant: every httpx client of this package that goes after redirects, or whose caller does, is made with `STAY_OUTSIDE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from research_rl.config import addresses
from research_rl.errors import DataError

if TYPE_CHECKING:
    import httpx

__all__ = ["STAY_OUTSIDE", "stay_outside"]


def stay_outside(reply: httpx.Response) -> None:
    """Raise DataError for the reply of a public host that redirects to an internal address."""
    if reply.has_redirect_location and not addresses.is_internal(reply.request.url.host):
        target = reply.request.url.join(reply.headers["Location"])
        if addresses.is_internal(target.host):
            raise DataError(
                f"{addresses.public(str(reply.request.url))} redirects to the internal address {target.host}; "
                "name that address itself if it is meant"
            )


STAY_OUTSIDE: Mapping[str, list[Callable[..., Any]]] = {"response": [stay_outside]}
"""The event hooks of an httpx client."""
