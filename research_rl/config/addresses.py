"""What an address in the configuration may hold, and where a redirect may lead. Knows addresses; sends no request.

Addresses are recorded in params.yaml, manifests and tracking, so one that carries a secret is refused when it is read.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import parse_qsl, urlsplit

from research_rl.errors import ConfigError

__all__ = ["check", "is_internal"]

_SECRET = re.compile(
    r"(^|[-_])(sig|signature|token|key|apikey|secret|password|passwd|pwd|auth|authorization|credential|awsaccesskeyid)$", re.IGNORECASE
)
_REMEDY = (
    "addresses are recorded; keep credentials in the environment instead: HF_TOKEN for a hub, the AWS_ variables for s3://, "
    "for a web server ~/.netrc or the file that NETRC names"
)


def check(address: str) -> None:
    """Raise ConfigError for an address that is malformed or carries a user, a password or a signed query. Other names pass."""
    if "://" not in address:
        return
    try:
        parts = urlsplit(address)
        # Reading the port is what finds a malformed one.
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        # Not the address itself: a malformed one may still hold a password.
        raise ConfigError(f"{address.partition('://')[0]}://... is malformed ({error}); write scheme://host[:port]/path") from None
    if "@" in parts.netloc:
        raise ConfigError(f"the address at {host} carries a user or password; {_REMEDY}")
    secrets = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)]
    if secrets and parts.scheme in ("http", "https"):
        raise ConfigError(f"the address at {host} carries {', '.join(secrets)} in its query; {_REMEDY}")


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
