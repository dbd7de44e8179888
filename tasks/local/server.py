"""A Prefect server for one run by hand. Knows Prefect's settings; leaves guarding to `research_rl.process.services`.

Prefect would start a temporary server itself, but one that outlives a killed run. This one ends with its starter.
"""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from research_rl.errors import ResearchError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process import proxies
from research_rl.process.services import free_port, guarded
from tasks import quiet, settings
from tasks.local import apps

__all__ = ["served", "server"]

_ANSWER_S = 30.0


def server(checkout: Path = CHECKOUT) -> str:
    """Return the address of a server that answers: the configured one, that of `make up`, or one started for this process's life.

    Also points MLflow's clients at the server of `make up` where it runs. Raises ServiceError when a server that should answer does
    not. The end of a started one waits for Prefect's own exit handlers, which still send logs.
    """
    proxies.require_usable()
    running = settings.running(checkout)
    if uri := running.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_TRACKING_URI", uri)
    configured, local = _configured(checkout), running.get("PREFECT_API_URL")
    # A server of somebody else's gets no key of ours.
    if configured and configured != local:
        _require_answer(configured, "start it, or unset PREFECT_API_URL to have a server started for this run")
        return configured
    if local:
        _require_answer(local, "its process runs; see .services/stack/prefect-server.log, or run `make down` and `make up`")
        _use_until_exit(local, PREFECT_API_AUTH_STRING.value() or settings.keys(checkout)["PREFECT_API_AUTH_STRING"])
        return local
    return _started()


@contextmanager
def served() -> Generator[None]:
    """Have a server for a block. Raises ServiceError when none answers, and when it was lost while the block ran."""
    url = server()
    try:
        yield
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        if isinstance(error, ResearchError) or _answers(url):
            raise
        raise ServiceError(
            f"Prefect's server at {url} stopped answering during the run ({type(error).__name__}); "
            "finished stages are kept: start it again, and this run goes on where it was"
        ) from None


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=_ANSWER_S, **proxies.environment_options()).is_success
    except httpx.HTTPError:
        return False


def _configured(checkout: Path) -> str | None:
    """Return the address the caller set. One that only a prefect.toml of a stopped `make up` names is forgotten, with the file."""
    if explicit := os.environ.get("PREFECT_API_URL"):
        return explicit.rstrip("/")
    if "PREFECT_API_URL" in settings.running(checkout):
        return PREFECT_API_URL.value()
    settings.point_prefect_away(checkout)
    return None if PREFECT_API_URL.value() == settings.recorded(checkout).get("PREFECT_API_URL") else PREFECT_API_URL.value()


def _require_answer(url: str, remedy: str) -> None:
    deadline, failure = time.monotonic() + _ANSWER_S, "no answer"
    while time.monotonic() < deadline:
        try:
            rest = max(0.1, deadline - time.monotonic())
            httpx.get(f"{url}/health", timeout=rest, **proxies.environment_options()).raise_for_status()
            return
        # Nobody listens at that port: waiting would change nothing.
        except httpx.ConnectError as error:
            failure = str(error)
            break
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = str(error) or type(error).__name__
            time.sleep(0.5)
    raise ServiceError(f"Prefect's server at PREFECT_API_URL={url} does not answer ({failure}); {remedy}")


def _started() -> str:
    port = free_port()
    url, auth_string = f"http://{apps.HOST}:{port}/api", f"{settings.USER}:{secrets.token_urlsafe(32)}"
    deadline = float(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    open_until_exit = ExitStack()
    atexit.register(open_until_exit.close)
    # Entered first, so that it is removed last, after the server that writes its log there.
    folder = Path(open_until_exit.enter_context(TemporaryDirectory(prefix="research-prefect-")))
    # No interface, and no services that only a lasting server needs: as Prefect starts its own temporary server.
    env = {**apps.prefect_environment(port, auth_string), "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    command = apps.command("prefect", port)
    service = guarded("prefect", command, folder=folder, health_url=f"{url}/health", deadline_s=deadline, env=env)
    open_until_exit.enter_context(service)
    _use_until_exit(url, auth_string, open_until_exit)
    quiet.install(quiet.WithoutLink)
    return url


def _use_until_exit(url: str, auth_string: str, stack: ExitStack | None = None) -> None:
    """Let everything in this process, and the processes it starts, use the server at `url`."""
    if stack is None:
        stack = ExitStack()
        atexit.register(stack.close)
    stack.enter_context(temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth_string}))
