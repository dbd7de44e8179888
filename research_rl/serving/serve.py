"""Run a model server for the length of a block, or until stopped. Knows the workspace; leaves flags to `launch`.

Invariants: (1) a model folder is checked before anything starts; (2) a server that was not started here is used only
when it serves this very model, which its served name proves.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from research_rl.config import Config
from research_rl.errors import ServiceError
from research_rl.paths import interpreter_path
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Endpoint, base_url, guarded, require_free
from research_rl.process.tokens import token_from
from research_rl.serving import launch
from research_rl.serving.model import ModelFolder, check, served_name

__all__ = ["TOKEN_VARIABLE", "context_tokens", "running", "serve"]

TOKEN_VARIABLE = "RESEARCH_SERVING_TOKEN"


@contextmanager
def running(config: Config, workspace: Workspace, folder: Path, *, name: str = "model") -> Generator[Endpoint]:
    """Serve `folder` while the block runs, or use the server at `serving.url`. Raises ModelError and ServiceError.

    The token is RESEARCH_SERVING_TOKEN where it is set, else (for a server started here) a fresh one.
    """
    model = check(folder.resolve(), context_tokens(config))
    if config.serving.url:
        yield _existing(config.serving.url, served_name(model.path))
        return
    with _started(config, workspace, model, name) as endpoint:
        yield endpoint


def context_tokens(config: Config) -> int:
    """Return the longest sequence an episode can reach, in tokens."""
    return config.prompt.max_tokens + config.episode.max_response_tokens


def serve(config: Config, workspace: Workspace, folder: Path | None = None) -> None:
    """Serve a model (the trained policy when `folder` is None) until interrupted; print where and as what."""
    with running(config, workspace, folder or workspace.folder("export"), name="serve-model") as endpoint:
        # In a file for its owner alone and not printed: what is printed ends up in logs.
        token = workspace.services / "serve-model.token"
        with _files({token: endpoint.token or ""}):
            print(f"{endpoint.model} at {endpoint.url}/v1; the bearer token is in {token}; stop with Ctrl-C", flush=True)
            threading.Event().wait()


@contextmanager
def _started(config: Config, workspace: Workspace, model: ModelFolder, name: str) -> Generator[Endpoint]:
    serving = config.serving
    # Also on loopback: other users of the machine reach it, too.
    token = token_from(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    port = require_free(serving.host, serving.port, "serving.port")
    endpoint = Endpoint(base_url(serving.host, port), token, served_name(model.path))
    plan = launch.render(
        serving,
        model,
        served_name=endpoint.model or "",
        interpreter=_interpreter(config),
        port=port,
        token=token,
        context=context_tokens(config),
        secrets=workspace.services,
    )
    service = guarded(
        name,
        plan.command,
        folder=workspace.services,
        health_url=endpoint.url + launch.HEALTH_PATH,
        deadline_s=serving.start_deadline_s,
        env=plan.env,
    )
    # The files first: the server reads its key from them when it starts.
    with _files(plan.files), service:
        # A health check asks for no token: another server that took the port in between would pass it.
        if endpoint.model not in (names := _served(endpoint.url, token)):
            raise ServiceError(
                f"{endpoint.url} serves {names}, not {endpoint.model!r}; another server took serving.port={port}, name another"
            )
        yield endpoint


def _existing(url: str, model: str) -> Endpoint:
    """Return the endpoint of a server started by others, after asking what it serves. Raises ServiceError."""
    base, token = url.removesuffix("/").removesuffix("/v1"), token_from(TOKEN_VARIABLE)
    if model not in (names := _served(base, token)):
        raise ServiceError(
            f"serving.url={url!r} serves {names}, this stage needs {model!r}; start it with `research serve-model --model FOLDER`"
        )
    return Endpoint(base, token, model)


def _served(url: str, token: str | None) -> list[str]:
    """Return the names of the models that a server has. Raises ServiceError."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers, timeout=10.0, **httpx_options())
        if reply.status_code in (401, 403):
            raise ServiceError(f"{url} refuses the token (HTTP {reply.status_code}); set {TOKEN_VARIABLE} to the server's")
        return [str(model["id"]) for model in reply.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"{url} does not answer /v1/models ({error}); start the server of serving.url, or clear serving.url to have one started"
        ) from None


def _interpreter(config: Config) -> str:
    """Return the interpreter of the serving environment. Raises ServiceError when it is not there, ConfigError when it cannot be."""
    environments = config.environments
    name = "serve" if environments.serve else "policy"
    path = interpreter_path(environments.serve or environments.policy, f"environments.{name}")
    if not path.is_file():
        raise ServiceError(f"interpreter {path} does not exist; run `make setup`, or set environments.serve or environments.policy")
    return str(path)


@contextmanager
def _files(files: dict[Path, str]) -> Generator[None]:
    try:
        for path, text in files.items():
            write_private(path, text)
        yield
    finally:
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
