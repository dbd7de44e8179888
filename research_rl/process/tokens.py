"""Bearer tokens from the environment, and who must have one. Knows variables and what an HTTP header can carry; starts no service."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Protocol

from research_rl.errors import ConfigError
from research_rl.process.proxies import LOOPBACK
from research_rl.terminal import say

__all__ = ["Exposed", "checked_token", "require_token_outside", "token_from"]


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


class Exposed(Protocol):
    """The settings of a service that say who reaches it."""

    @property
    def host(self) -> str:
        """The address to bind."""
        ...

    @property
    def auth(self) -> str:
        """token, or none for a service that asks for no token."""
        ...

    @property
    def allow(self) -> Sequence[str]:
        """The networks that may ask; all when empty."""
        ...


def require_token_outside(section: str, settings: Exposed, token: str | None, variable: str) -> None:
    """Warn of a service that other machines reach without a token. Raises ConfigError where its settings ask for one and there is none.

    `section` names the settings in the configuration, `variable` the environment variable that holds the token.
    """
    if settings.host in LOOPBACK or (settings.auth == "token" and token):
        return
    if settings.auth == "token":
        raise ConfigError(
            f"{section}.host={settings.host} is reachable from outside but no token is set; set {variable}, or bind 127.0.0.1, "
            f"or let in who cannot send a token by {section}.auth=none and {section}.allow"
        )
    who = f"the networks {', '.join(settings.allow)}" if settings.allow else f"whoever reaches it; limit that by {section}.allow"
    say(f"{section}: warning: {section}.auth=none: {settings.host} answers {who}", sys.stderr)
