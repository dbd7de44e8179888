"""Credentials in addresses: found, refused in parameters, and taken out of all that is written. Knows text only.

An address holds a secret as `user:password@` in front of the host, or as the value of a query parameter such as a signature or a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "has_secret", "redact", "redact_tree"]

HIDDEN = "***"
# Up to the last @ before the path: a password may hold one.
_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s/?#'\"<>@]*(?:@[^\s/?#'\"<>@]*)*@")
_QUERY = re.compile(
    r"(?P<name>[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid|signature|sig"
    r"|(?:access|auth|refresh|session|id)?[_-]?token|api[_-]?key|access[_-]?key(?:[_-]?id)?|key|secret|client[_-]?secret|password|passwd|pwd)=)"
    r"[^&;#\s'\"<>]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return `text` with the credentials of every address in it replaced by `***`; text without any is returned as it is."""
    # Called for every text of every event, nearly all of which hold no address.
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\g<name>{HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", text))


def redact_tree(value: Any) -> Any:
    """Return a JSON-like value with every text in it redacted, the keys of mappings included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_tree(name): redact_tree(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redact_tree(item) for item in value]
    return value


def has_secret(address: str) -> bool:
    """Return whether an address holds credentials."""
    return redact(address) != address
