"""Credentials in addresses: found, and taken out of all that is written. Knows text only; `addresses` refuses them in parameters.

An address holds a secret as `user:password@` in front of the host, or as the value of a query parameter such as a signature or a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

__all__ = ["HIDDEN", "credentials", "redact", "redact_tree"]

HIDDEN = "***"
# Up to the last @ before the path: a password may hold one.
_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s/?#'\"<>@]*(?:@[^\s/?#'\"<>@]*)*@")
_QUERY = re.compile(r"[?&;](?P<name>[^=&;#?\s'\"<>]+)=[^&;#\s'\"<>]+")
# Whole names with or without a prefix: `api_key` and `X-Amz-Signature` are secrets, `monkey` and `keyword` are not.
_NAME = re.compile(
    r"(?:[\w.\-]*[-_.])?(?:(?:access|auth|refresh|session|security|api|id|client|private|secret|shared)?[-_]?"
    r"(?:signature|sig|token|key|key[-_]?id|secret|password|passwd|pwd|auth|authorization|credentials?)|(?:aws|google)access(?:key)?id)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return `text` with the credentials of every address in it replaced by `***`; text without any is returned as it is."""
    # Called for every text of every event, nearly all of which hold no address.
    if "://" not in text:
        return text
    return _QUERY.sub(_hidden, _USER.sub(rf"\g<scheme>{HIDDEN}@", text))


def _hidden(parameter: re.Match[str]) -> str:
    return f"{parameter[0][0]}{parameter['name']}={HIDDEN}" if _secret(parameter) else parameter[0]


def _secret(parameter: re.Match[str]) -> bool:
    """Whether a parameter of a query is a secret; its name is read as a server decodes it."""
    return _NAME.fullmatch(unquote(parameter["name"])) is not None


def redact_tree(value: Any) -> Any:
    """Return a JSON-like value with every text in it redacted, the keys of mappings included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_tree(name): redact_tree(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redact_tree(item) for item in value]
    return value


def credentials(address: str) -> list[str]:
    """Return what an address carries that others must not read, in words."""
    if "://" not in address:
        return []
    user = ["a user or password"] if _USER.search(address) else []
    return user + [f"{unquote(parameter['name'])} in its query" for parameter in _QUERY.finditer(address) if _secret(parameter)]
