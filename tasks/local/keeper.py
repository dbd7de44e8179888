"""Keep a service up, the retriever or the agent: start it, watch it, start it again. Knows a process and its health; knows no index.

Invariants: (1) one keeper of a service for a workspace; (2) the address stays the same over restarts; (3) whatever ends the keeper ends
the service; (4) a service that keeps failing is started ever more rarely, at most every `_LONGEST_PAUSE_S`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from research_rl.agent.command import NAME as AGENT
from research_rl.agent.command import TOKEN as AGENT_TOKEN
from research_rl.agent.command import address_file
from research_rl.config import Config
from research_rl.errors import ServiceError
from research_rl.paths import PYTHON, python_path
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Process, base_url, find, reap, require_free, spawn, wait_healthy
from research_rl.process.tokens import token_from
from research_rl.report import markdown
from research_rl.retriever import TOKEN
from research_rl.retriever.command import launch
from tasks.artifacts import showing
from tasks.job import folder_of

__all__ = ["KeptService", "is_kept", "keep", "keep_agent", "stop_serving"]

_EVERY_S = 2.0
_FAILED_CHECKS = 5
"""Failed health checks in a row after which a service that still runs is started again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STABLE_S = 60.0
_CLOSE_S = 30.0
"""What an agent needs after `agent.drain_s` to end its servers."""


@dataclass(frozen=True)
class KeptService:
    """A service that is kept up at `url`. When an artifact of `stages` is built anew, which it does not follow, it is started again.

    `launch` starts its process, `show` tells of its n-th start.
    """

    name: str
    url: str
    start_deadline_s: float
    stages: Sequence[str]
    launch: Callable[[], Process]
    show: Callable[[int], None]


def _folder(workspace: Workspace) -> Path:
    """Return where the kept retriever has its pid file and log: apart from a run's services, which the next run ends."""
    return workspace.root / ".serving"


def keep(config: Config, workspace: Workspace, part: str = "1/1", until: Callable[[], bool] = lambda: False) -> None:
    """Keep a retriever running until `until` says so or this process is told to end.

    Raises ServiceError when the first start fails; later failures are answered by another start.
    """
    # Chosen once: clients keep the address over restarts.
    port = require_free(config.retriever.host, config.retriever.port, "retriever.port")
    url = base_url(config.retriever.host, port)
    retriever = KeptService(
        "retriever",
        url,
        config.retriever.start_deadline_s,
        () if config.retriever.follow_s else ("index",),
        lambda: launch(config, workspace, port, folder=_folder(workspace), part=part),
        lambda starts: _show(workspace, url, starts),
    )
    _keep(retriever, workspace, until)


def keep_agent(config: Config, workspace: Workspace, overrides: Mapping[str, Any], until: Callable[[], bool] = lambda: False) -> None:
    """Keep an agent service running as `keep` does a retriever; `config` is params.yaml with `overrides`. Raises ServiceError."""
    port = require_free(config.agent.host, config.agent.port, "agent.port")
    url = base_url(config.agent.host, port)
    command = [PYTHON, "-m", "research_rl", "serve-agent", "--workspace", str(workspace.root)]
    command += [f"{name}={json.dumps(value)}" for name, value in {**overrides, "agent.port": port}.items()]
    # Drawn once, as the address is chosen once: each start by itself would draw another.
    token = token_from(AGENT_TOKEN) or secrets.token_urlsafe(24)

    def started() -> Process:
        env = python_path(os.environ.get("PYTHONPATH")) | {AGENT_TOKEN: token}
        return spawn(AGENT, command, folder=_folder(workspace), env=env, grace_s=config.agent.drain_s + _CLOSE_S)

    # It answers only after both of its servers do.
    deadline_s = config.retriever.start_deadline_s + config.serving.start_deadline_s
    # Another model than the trained one does not change with the workspace's; an alias is followed without a start.
    stages = ("index", "export") if config.agent.model == "after" else ("index",)
    agent = KeptService(AGENT, url, deadline_s, stages, started, lambda starts: _show_agent(workspace, url, starts))
    _keep(agent, workspace, until)


def _keep(service: KeptService, workspace: Workspace, until: Callable[[], bool]) -> None:
    starts, pause = 0, _FIRST_PAUSE_S
    while not until():
        began = time.monotonic()
        try:
            with _started(service) as process:
                starts += 1
                service.show(starts)
                reason = _watched(service, process, workspace, until)
        except ServiceError as error:
            # A service that never answered is misconfigured; starting it again would hide the reason.
            if not starts:
                raise
            reason = str(error)
        if until():
            return
        pause = _FIRST_PAUSE_S if time.monotonic() - began > _STABLE_S else pause
        get_run_logger().warning("the %s %s; it is started again in %g s", service.name, reason, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def _started(service: KeptService) -> Generator[Process]:
    process = service.launch()
    try:
        wait_healthy(process, f"{service.url}/readyz", service.start_deadline_s)
        get_run_logger().info("%s at %s, log %s", service.name, service.url, process.log)
        yield process
    finally:
        process.stop()


def _watched(service: KeptService, process: Process, workspace: Workspace, until: Callable[[], bool]) -> str:
    """Return why the service has to be started again, or nothing of interest once `until` says so."""
    failed, edition = 0, _edition(service, workspace)
    while not until():
        time.sleep(_EVERY_S)
        if (code := process.poll()) is not None:
            return f"ended with code {code}"
        failed = 0 if _answers(service.url) else failed + 1
        if failed >= _FAILED_CHECKS:
            return f"failed {failed} health checks in a row"
        # Empty while an artifact is published: the old one, which is still open, is served until the new one stands.
        if (now := _edition(service, workspace)) and now != edition:
            return f"serves an artifact ({' or '.join(service.stages)}) that was built anew since"
    return "was told to end"


def _edition(service: KeptService, workspace: Workspace) -> bytes:
    """Return what identifies the artifacts that stand now; empty while one is being published."""
    try:
        return b"".join((workspace.folder(stage) / manifest.MANIFEST).read_bytes() for stage in service.stages)
    except FileNotFoundError:
        return b""


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, **httpx_options()).is_success
    except httpx.HTTPError:
        return False


def _show(workspace: Workspace, url: str, starts: int) -> None:
    """Publish the address and what is served as an artifact; each start is a new version of it."""
    token = token_from(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    rows = [("address", url), ("description", f"{url}/openapi.json"), ("metrics", f"{url}/metrics"), ("start", str(starts))]
    with showing("the retriever's address"):
        facts: dict[str, Any] = httpx.get(f"{url}/info", headers=headers, timeout=10.0, **httpx_options()).raise_for_status().json()
        rows += [(name, f"`{json.dumps(value)}`") for name, value in facts.items()]
        text = f"# Retriever\n\n{markdown.table(('', ''), rows)}\n\nWorkspace {workspace.root}"
        create_markdown_artifact(text, key="retriever", description=f"Retriever at {url}")


def _show_agent(workspace: Workspace, url: str, starts: int) -> None:
    """Publish the address as an artifact; each start is a new version of it."""
    rows = [("page", f"{url}/"), ("for programs", f"{url}/v1"), ("token", f"in {address_file(workspace)}"), ("start", str(starts))]
    with showing("the agent's address"):
        text = f"# Agent\n\n{markdown.table(('', ''), rows)}\n\nWorkspace {workspace.root}"
        create_markdown_artifact(text, key="agent", description=f"Agent at {url}")


def is_kept(workspace: Workspace) -> bool:
    """Whether an agent is kept up for this workspace now."""
    return find(_folder(workspace), AGENT) is not None


def stop_serving(flow: Any, flow_run: Any, state: Any) -> None:
    """Flow hook: end a service that a crashed keeper left behind."""
    reap(_folder(Workspace(folder_of(flow_run.parameters.get("workspace", ".")))))
