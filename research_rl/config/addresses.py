"""What an address in the configuration may hold, and where a redirect may lead. Knows addresses; sends no request.

Addresses are recorded in params.yaml, manifests and tracking, so one that carries credentials is refused when it is read.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit, urlunsplit

from research_rl.config.redact import credentials
from research_rl.errors import ConfigError

__all__ = ["check", "is_internal", "public"]


def check(address: str, remedy: str) -> None:
    """Raise ConfigError for an address that is malformed or carries credentials; `remedy` says where they belong. Other texts pass."""
    if "://" not in address:
        return
    try:
        parts = urlsplit(address)
        # Reading the port is what finds a malformed one.
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        # Not the address itself: a malformed one may still hold a password.
        raise ConfigError(f"{address.partition('://')[0]}://... is malformed ({error}); write scheme://host[:port]/path") from None
    if secrets := credentials(address):
        raise ConfigError(f"the address at {host or parts.scheme} carries {', '.join(secrets)}; parameters are recorded: {remedy}")


def public(url: str) -> str:
    """Return an address without credentials, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_internal(host: str) -> bool:
    """Return whether a host is, or resolves to, an address of no public network: private, loopback, link-local or reserved."""
    return any(not _public(text) for text in _resolved(host))


def _resolved(host: str) -> list[str]:
    try:
        return [str(item[4][0]) for item in socket.getaddrinfo(host, None)]
    except (OSError, UnicodeError):  # the request will say that nobody answers there
        return []


def _public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    # ::ffff:127.0.0.1 reaches the same machine as 127.0.0.1.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_global
