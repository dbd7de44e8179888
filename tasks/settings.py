"""Environment of Prefect and MLflow, set before either is imported, and what is known of the services of `make up`.

Invariants: (1) importing a flow opens no connection and changes no file; (2) a variable that the caller set always wins; (3) a key
is in no file that others than its owner can read, and is given to no other server than its own.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from research_rl.paths import CHECKOUT
from research_rl.process import services
from research_rl.process.private import write_private
from research_rl.process.proxies import bypass_loopback

__all__ = [
    "ADDRESSES",
    "HEARTBEAT",
    "HEARTBEAT_S",
    "KEYS",
    "LEASES",
    "PATIENCE",
    "apply",
    "keys",
    "point_prefect_at",
    "point_prefect_away",
    "recorded",
    "running",
    "sign_in",
    "stack_folder",
]

ADDRESSES = "addresses.json"
KEYS = "keys.json"
USER = "research"
PATIENCE = {"PREFECT_CLIENT_MAX_RETRIES": "3"}
"""Each of the dozen requests with which a run ends waits 2 + 4 + 8 s for a server that is gone, not for a minute as by default."""
HEARTBEAT_S = 30
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}
"""A run says so often that it lives; the automation that finds killed runs waits for a few of these."""
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""The server keeps in PREFECT_HOME who holds a place of a limit. By default that is in its memory: once it was started again, the place of
a run that died would never come free."""
_SERVERS = {"PREFECT_API_URL": "prefect-server", "MLFLOW_TRACKING_URI": "mlflow-server"}
_MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_TOML = "prefect.toml"
_OURS = "# Written by `make up`, removed by `make down`."


def stack_folder(checkout: Path = CHECKOUT) -> Path:
    """Return the folder with the pid files, logs, addresses and keys of the processes that `make up` started."""
    return checkout / ".services" / "stack"


def apply(checkout: Path = CHECKOUT) -> None:
    """Set what is not set: home and quiet start of Prefect, no analytics; and keep traffic to this machine away from proxies."""
    defaults = {
        "PREFECT_HOME": str(checkout / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
        **PATIENCE,
        **HEARTBEAT,
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.update(bypass_loopback(os.environ))


def recorded(checkout: Path = CHECKOUT) -> dict[str, str]:
    """Return the addresses of the last `make up`, by environment variable; empty when nothing was started."""
    try:
        return json.loads((stack_folder(checkout) / ADDRESSES).read_text())
    except FileNotFoundError:
        return {}


def running(checkout: Path = CHECKOUT) -> dict[str, str]:
    """Return the addresses of `make up` whose server runs, as the pid files say; asks no server."""
    names, addresses = services.running(stack_folder(checkout)), recorded(checkout)
    return {variable: addresses[variable] for variable, name in _SERVERS.items() if variable in addresses and name in names}


def keys(checkout: Path = CHECKOUT) -> dict[str, str]:
    """Return user and key of Prefect's and of MLflow's API, by environment variable; drawn at the first call, then kept.

    They stay the same over `make down`, so that a browser which has stored them goes on working.
    """
    path = stack_folder(checkout) / KEYS
    if not path.is_file():
        values = (f"{USER}:{secrets.token_urlsafe(32)}", USER, secrets.token_urlsafe(32))
        write_private(path, json.dumps(dict(zip(("PREFECT_API_AUTH_STRING", *_MLFLOW_KEYS), values, strict=True)), indent=1))
    return json.loads(path.read_text())


def sign_in(uri: str, checkout: Path = CHECKOUT) -> None:
    """Let this process's MLflow client use the server at `uri`: with the key of `make up` for that server, without it for others."""
    if not (stack_folder(checkout) / KEYS).is_file():
        return
    stack_keys, ours = keys(checkout), uri.rstrip("/") == recorded(checkout).get("MLFLOW_TRACKING_URI")
    for name in _MLFLOW_KEYS:
        if ours:
            os.environ.setdefault(name, stack_keys[name])
        # Left by an earlier call for the server of `make up`; a key that the caller set for another server stays.
        elif os.environ.get(name) == stack_keys[name]:
            del os.environ[name]


def point_prefect_at(checkout: Path, variables: Mapping[str, str]) -> None:
    """Write prefect.toml, by which every `prefect` command typed in the checkout finds the server of `make up` and its key."""
    url, key = json.dumps(variables["PREFECT_API_URL"]), json.dumps(variables["PREFECT_API_AUTH_STRING"])
    write_private(checkout / _TOML, f"{_OURS}\n[api]\nurl = {url}\nauth_string = {key}\n")


def point_prefect_away(checkout: Path) -> None:
    """Remove prefect.toml if `make up` wrote it."""
    path = checkout / _TOML
    # A prefect.toml of the user's own stays.
    if path.is_file() and path.read_text().startswith(_OURS):
        path.unlink()
