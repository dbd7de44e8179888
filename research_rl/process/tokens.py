"""Bearer tokens from the environment. Knows variables and what an HTTP header can carry; knows no service. Standard library only."""

from __future__ import annotations

import os

from research_rl.errors import ConfigError

__all__ = ["checked_token", "token_from"]


def token_from(variable: str) -> str | None:
    """Return the token in an environment variable, None when it is unset or blank. Raises ConfigError."""
    return checked_token(os.environ.get(variable, ""), variable)


def checked_token(text: str, source: str) -> str | None:
    """Return a token without the white space around it, which files and shells add; None when nothing is left.

    Raises ConfigError, which names `source` and never the token, when a header cannot carry it.
    """
    token = text.strip()
    for position, character in enumerate(token):
        if not "!" <= character <= "~":
            raise ConfigError(
                f"{source} has the character U+{ord(character):04X} at position {position}; "
                "a bearer token is ASCII letters, digits and signs without white space: set another token"
            )
    return token or None
