"""`python -m tasks.local.compose up|down|secrets`: infra/compose.yaml with a secrets file of its own. Knows Docker's command and names.

Invariants: (1) a secret that stands is never replaced: databases are made with it; (2) the file has mode 0600 before it has content.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from research_rl.errors import ConfigError, ResearchError
from research_rl.paths import CHECKOUT
from research_rl.process.private import write_private
from research_rl.terminal import say
from tasks import settings

__all__ = ["COMPOSE", "main", "write_secrets"]

COMPOSE = CHECKOUT / "infra" / "compose.yaml"
SECRETS = COMPOSE.parent / ".env"
_NAMED = re.compile(r"\$\{(\w+):\?")
"""A variable without which compose does not start."""


def write_secrets(path: Path = SECRETS, compose: Path = COMPOSE) -> list[str]:
    """Draw each secret that compose asks for and that neither the file nor the environment has; return the names of those drawn."""
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {line.partition("=")[0] for line in lines} | set(os.environ)
    missing = sorted(set(_NAMED.findall(compose.read_text())) - known)
    if missing:
        write_private(path, "\n".join([*lines, *(f"{name}={_drawn(name)}" for name in missing)]) + "\n")
    return missing


def _drawn(name: str) -> str:
    # Hexadecimal: no character of it means anything in an address, an ini file or a shell.
    secret = secrets.token_hex(32)
    return f"{settings.USER}:{secret}" if name == "PREFECT_KEY" else secret


def _docker(*arguments: str) -> None:
    if not (docker := shutil.which("docker")):
        raise ConfigError("the command docker is not found; install Docker with its plug-in compose (2.24 or later), or use `make up`")
    code = subprocess.run([docker, "compose", "--file", str(COMPOSE), *arguments]).returncode
    if code:
        raise ConfigError(f"`docker compose {' '.join(arguments)}` ended with code {code}; what it printed above says why")


def _up() -> None:
    if drawn := write_secrets():
        say(f"drew {', '.join(drawn)} into {SECRETS}")
    _docker("up", "--build", "--detach", "--wait")
    say(f"Prefect  http://127.0.0.1:4200\nMLflow   http://127.0.0.1:5000\nGrafana  http://127.0.0.1:3000\nsecrets  {SECRETS}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    verbs = {"up": _up, "down": lambda: _docker("down"), "secrets": lambda: say("\n".join(write_secrets()) or "all stand")}
    parser = argparse.ArgumentParser("tasks.local.compose", description="The servers of infra/compose.yaml.")
    parser.add_argument("verb", choices=list(verbs), help="up: build and start; down: stop; secrets: only draw what is missing")
    try:
        verbs[parser.parse_args(arguments).verb]()
    except ResearchError as error:
        say(f"compose: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
