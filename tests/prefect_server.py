"""Prefect's server as `make up` starts it, over a folder that outlives it: automations, limits and their clean-up run in it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.testing import utilities

from research_rl.process.services import require_free
from tasks import settings
from tasks.local import apps
from tests.databases import lay_prefect
from tests.waiting import PATIENCE_S, until

KEY = "research:of-the-test"


@contextmanager
def harness() -> Generator[None]:
    """Run flows against a server of their own, as Prefect's harness for tests does, over a database of `lay_prefect`."""
    folder = tempfile.mkdtemp()
    lay_prefect(Path(folder) / "prefect-test.db")
    there = mock.patch.object(utilities, "mkdtemp", return_value=folder)
    with there, utilities.prefect_test_harness(server_startup_timeout=int(PATIENCE_S)):
        yield


class Server:
    """A server that runs; `env` is that of its clients, too."""

    def __init__(self, home: Path) -> None:
        port = require_free(apps.HOST, 0, "")
        lay_prefect(home / "prefect.db")
        self.home, self.url = home, f"http://{apps.HOST}:{port}/api"
        own = {"PREFECT_HOME": str(home), "PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": KEY}
        self.env = {**os.environ, **settings.PATIENCE, **apps.prefect_environment(port, KEY), **own}
        self.command = apps.command("prefect", port)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log)
        assert until(self._answers, over=lambda: self.process.poll() is not None), (self.home / "log").read_text()[-3000:]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it as a machine that is switched off does."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def client(self) -> Generator[SyncPrefectClient]:
        """Yield a client of it."""
        with temporary_settings({PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: KEY}), get_client(sync_client=True) as client:
            yield client
