"""Environment of Prefect and MLflow, set before either is imported. Knows variables and the addresses file of `make up`.

A variable that the caller set always wins. Standard library and httpx only, so that it is cheap to import first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx

from research_rl.paths import CHECKOUT

__all__ = ["ADDRESSES", "apply", "point_prefect_at", "point_prefect_away", "stack_folder"]

ADDRESSES = "addresses.json"
_TOML = "prefect.toml"
_OURS = "# Written by `make up`, removed by `make down`."


def stack_folder(checkout: Path = CHECKOUT) -> Path:
    """Return the folder with the pid files, logs and addresses of the processes that `make up` started."""
    return checkout / ".services" / "stack"


def apply(checkout: Path = CHECKOUT) -> None:
    """Set what is not set: home and quiet start of Prefect, no analytics, and the servers of `make up` when they answer."""
    defaults = {
        "PREFECT_HOME": str(checkout / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    running = _running(checkout)
    if "PREFECT_API_URL" not in running:
        point_prefect_away(checkout)
    for name, value in running.items():
        os.environ.setdefault(name, value)


def _running(checkout: Path) -> dict[str, str]:
    """Return the variables that point at the servers of `make up`, each only while its server answers."""
    try:
        known: dict[str, str] = json.loads((stack_folder(checkout) / ADDRESSES).read_text())
    except FileNotFoundError:
        return {}
    health = {"PREFECT_API_URL": "/health", "MLFLOW_TRACKING_URI": "/health"}
    return {name: known[name] for name, path in health.items() if name in known and _answers(known[name] + path)}


def point_prefect_at(checkout: Path, url: str) -> None:
    """Write prefect.toml, by which every `prefect` command typed in the checkout finds the server of `make up`."""
    (checkout / _TOML).write_text(f'{_OURS}\n[api]\nurl = "{url}"\n')


def point_prefect_away(checkout: Path) -> None:
    """Remove prefect.toml if `make up` wrote it."""
    path = checkout / _TOML
    if path.is_file() and path.read_text().startswith(_OURS):
        path.unlink()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False
