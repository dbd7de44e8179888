"""A Prefect server for one run by hand. Knows Prefect's settings; leaves guarding to `research_rl.process.services`.

Prefect would start a temporary server itself, but one that outlives a killed run. This one ends with its starter.
"""

from __future__ import annotations

import atexit
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings

from research_rl.process.services import free_port, guarded

__all__ = ["server"]

_APP = "prefect.server.api.server:create_app"


def server() -> str:
    """Return the address of a server that answers: the configured one, else one started for the life of this process.

    Raises ServiceError when it does not start in time. Its end waits for Prefect's own exit handlers, which still send logs.
    """
    if configured := PREFECT_API_URL.value():
        return configured
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "uvicorn", "--factory", _APP, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    deadline = float(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    open_until_exit = ExitStack()
    atexit.register(open_until_exit.close)
    folder = Path(open_until_exit.enter_context(TemporaryDirectory(prefix="research-prefect-")))
    service = guarded("prefect", command, folder=folder, health_url=f"{url}/health", deadline_s=deadline, env=_environment())
    open_until_exit.enter_context(service)
    open_until_exit.enter_context(temporary_settings({PREFECT_API_URL: url}))
    return url


def _environment() -> dict[str, str]:
    """Return what turns off the interface and marks the server as one of a single run, as Prefect does for its own."""
    return {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
