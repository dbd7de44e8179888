"""The retriever: passages for queries over HTTP, and the client that asks for them."""

from __future__ import annotations

import os

from research_rl.errors import ConfigError

__all__ = ["LOOPBACK", "TOKEN", "checked_token", "read_token"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN = "RESEARCH_RETRIEVER_TOKEN"
"""Environment variable with the service's bearer token; servers and clients alike read it."""


def read_token() -> str | None:
    """Return the token of the environment, None when there is none. Raises ConfigError for one that no header can carry."""
    return checked_token(os.environ.get(TOKEN, ""), TOKEN)


def checked_token(text: str, source: str) -> str | None:
    """Return a token without the blanks and line ends around it, None for an empty one; `source` names where it came from.

    Raises ConfigError for a token with a character that an HTTP header cannot carry; the message holds no part of the token.
    """
    token = text.strip()
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"{source} holds a blank, a control character or one outside ASCII, which no HTTP header carries; "
            "use letters, digits and punctuation, such as the output of `openssl rand -hex 32`"
        )
    return token or None
