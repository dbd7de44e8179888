"""MLflow's server as `mlflow server` runs it, in one process instead of its three, each of which imports all of MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from mlflow.server import constants

from research_rl.process.services import Process, free_port, guarded
from tests.databases import lay_mlflow
from tests.waiting import PATIENCE_S


def mlflow_server(folder: Path) -> tuple[str, Callable[[], AbstractContextManager[Process]]]:
    """Return the address of a server that keeps everything in `folder`, and a function that opens a block in which it runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    lay_mlflow(folder / "server.db")
    env = {
        constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder}/server.db",
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "stored"),
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app", "--host", "127.0.0.1", "--port", str(port)]
    return url, lambda: guarded("mlflow", command, folder=folder / "server", health_url=f"{url}/health", deadline_s=PATIENCE_S, env=env)
