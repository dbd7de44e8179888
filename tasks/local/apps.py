"""Prefect's and MLflow's servers behind `Guard`, as factories for `python -m uvicorn --factory`. Knows their settings; starts nothing.

Prefect alone answers any page of the web, takes any Host and reads JSON that was sent as text; MLflow alone asks for no user.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from research_rl.paths import CHECKOUT, PYTHON
from research_rl.process.access import Access, Guard, basic
from tasks.local import sign_in
from tasks.settings import LEASES
from tasks.sqlite import sqlite_uri

__all__ = ["command", "mlflow", "mlflow_environment", "prefect", "prefect_environment"]

HOST = "127.0.0.1"
_STORE = "RESEARCH_MLFLOW_FOLDER"
_KEY = "RESEARCH_MLFLOW_KEY"
# MLflow's clients send spans and models in these forms besides JSON; a browser sends none of the three across origins unasked.
_JSON = "application/json"
_MLFLOW_TYPES = (_JSON, "application/x-protobuf", "application/octet-stream")


def command(factory: str, port: int) -> tuple[str, ...]:
    """Return how to run one of this module's factories on loopback."""
    flags = ("--host", HOST, "--port", str(port), "--log-level", "warning", "--no-server-header", "--no-proxy-headers")
    flags += ("--http", "tasks.local.protocol:Bounded")
    return (PYTHON, "-m", "uvicorn", "--factory", f"{__name__}:{factory}", *flags)


def prefect_environment(port: int, auth_string: str) -> dict[str, str]:
    """Return what Prefect's server needs to be told: its port, `user:key` of its API, and its own pages as the only origins."""
    url = f"http://{HOST}:{port}/api"
    return {
        **_common(),
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": url,
        "PREFECT_SERVER_API_AUTH_STRING": auth_string,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": _origins(port),
        "PREFECT__SERVER_FINAL": "1",
        **LEASES,
    }


def mlflow_environment(port: int, folder: Path, keys: Mapping[str, str]) -> dict[str, str]:
    """Return what MLflow's server needs to be told: its port, the folder of its database and artifacts, and its user and key."""
    return {
        **_common(),
        _STORE: str(folder),
        _KEY: f"{keys['MLFLOW_TRACKING_USERNAME']}:{keys['MLFLOW_TRACKING_PASSWORD']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_names(port)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": _origins(port),
    }


def _common() -> dict[str, str]:
    pythonpath = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": pythonpath, "DO_NOT_TRACK": "1"}


def _names(port: int) -> tuple[str, ...]:
    return f"{HOST}:{port}", f"localhost:{port}"


def _origins(port: int) -> str:
    return ",".join(f"http://{name}" for name in _names(port))


def prefect() -> Guard:
    """Return Prefect's server, which itself asks for the user and key of PREFECT_SERVER_API_AUTH_STRING."""
    from prefect.server.api.server import create_app

    return Guard(sign_in.prefect(create_app()), Access(content_types=(_JSON,)))


def mlflow() -> Guard:
    """Return MLflow's server over the database of its folder; its artifacts are files that clients read and write themselves."""
    folder, user_and_key = Path(os.environ[_STORE]), os.environ.pop(_KEY)
    from mlflow.server import constants

    store, artifacts = sqlite_uri(folder / "mlflow.db"), (folder / "mlartifacts").as_uri()
    os.environ |= {constants.BACKEND_STORE_URI_ENV_VAR: store, constants.ARTIFACT_ROOT_ENV_VAR: artifacts}
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, store, artifacts)
    return Guard(sign_in.mlflow(app), Access(content_types=_MLFLOW_TYPES, authorization=basic(user_and_key), open_paths=("/health",)))
