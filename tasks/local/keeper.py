"""Keep a retriever up: start it, watch it, start it again. Knows a process and its health; knows no index.

Invariants: (1) one keeper for a workspace; (2) the address stays the same over restarts; (3) whatever ends the keeper ends the
retriever; (4) a retriever that keeps failing is started ever more rarely, at most every `_LONGEST_PAUSE_S`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from research_rl.config import Config
from research_rl.errors import ServiceError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.proxies import httpx_options
from research_rl.process.services import Process, base_url, reap, require_free, wait_healthy
from research_rl.process.tokens import token_from
from research_rl.report import markdown
from research_rl.retriever import TOKEN
from research_rl.retriever.command import launch
from tasks.artifacts import showing
from tasks.job import folder_of

__all__ = ["keep", "stop_serving"]

_EVERY_S = 2.0
_FAILED_CHECKS = 5
"""Failed health checks in a row after which a retriever that still runs is started again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STABLE_S = 60.0


def _folder(workspace: Workspace) -> Path:
    """Return where the kept retriever has its pid file and log: apart from a run's services, which the next run ends."""
    return workspace.root / ".serving"


def keep(config: Config, workspace: Workspace, part: str = "1/1", until: Callable[[], bool] = lambda: False) -> None:
    """Keep a retriever running until `until` says so or this process is told to end.

    Raises ServiceError when the first start fails; later failures are answered by another start.
    """
    # Chosen once: clients keep the address over restarts.
    port = require_free(config.retriever.host, config.retriever.port, "retriever.port")
    url, starts, pause = base_url(config.retriever.host, port), 0, _FIRST_PAUSE_S
    while not until():
        began = time.monotonic()
        try:
            with _started(config, workspace, port, url, part) as process:
                starts += 1
                _show(workspace, url, starts)
                reason = _watched(process, workspace, url, until)
        except ServiceError as error:
            # A retriever that never answered is misconfigured; starting it again would hide the reason.
            if not starts:
                raise
            reason = str(error)
        if until():
            return
        pause = _FIRST_PAUSE_S if time.monotonic() - began > _STABLE_S else pause
        get_run_logger().warning("the retriever %s; it is started again in %g s", reason, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def _started(config: Config, workspace: Workspace, port: int, url: str, part: str) -> Generator[Process]:
    process = launch(config, workspace, port, folder=_folder(workspace), part=part)
    try:
        wait_healthy(process, f"{url}/readyz", config.retriever.start_deadline_s)
        get_run_logger().info("retriever at %s, log %s", url, process.log)
        yield process
    finally:
        process.stop()


def _watched(process: Process, workspace: Workspace, url: str, until: Callable[[], bool]) -> str:
    """Return why the retriever has to be started again, or nothing of interest once `until` says so."""
    failed, edition = 0, _edition(workspace)
    while not until():
        time.sleep(_EVERY_S)
        if (code := process.poll()) is not None:
            return f"ended with code {code}"
        failed = 0 if _answers(url) else failed + 1
        if failed >= _FAILED_CHECKS:
            return f"failed {failed} health checks in a row"
        # Empty while a new index is published: the old one, which is still open, is served until the new one stands.
        if (now := _edition(workspace)) and now != edition:
            return "serves an index that was built anew since"
    return "was told to end"


def _edition(workspace: Workspace) -> bytes:
    """Return what identifies the index that stands now; empty while one is being published."""
    try:
        return (workspace.folder("index") / manifest.MANIFEST).read_bytes()
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


def stop_serving(flow: Any, flow_run: Any, state: Any) -> None:
    """Flow hook: end a retriever that a crashed keeper left behind."""
    reap(_folder(Workspace(folder_of(flow_run.parameters.get("workspace", ".")))))
