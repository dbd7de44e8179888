"""Run the service in this process: listen, open the index, say where it answers, drain on a signal. Knows no search.

Invariants: (1) from SIGTERM on /readyz says 503 and new searches are refused, while what was accepted is answered for up to
`retriever.drain_s`; (2) an index that cannot be opened at the start ends the process with the reason; (3) every `retriever.follow_s` it
looks for a newer one.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
import time

import uvicorn

from research_rl.config import RetrieverConfig
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.connections import bounded
from research_rl.process.draining import DrainingServer
from research_rl.process.open_files import file_limit
from research_rl.retriever.app import RetrieverService
from research_rl.retriever.observe import RequestLog
from research_rl.retriever.retriever import Retriever
from research_rl.terminal import say

__all__ = ["another", "options", "run", "standing"]


def run(
    listener: socket.socket, url: str, config: RetrieverConfig, workspace: Workspace, token: str | None, part: tuple[int, int] = (0, 1)
) -> None:
    """Serve on a bound socket until a signal. Raises ManifestError, ModelError or ConfigError when the index cannot be opened."""
    started = time.monotonic()

    def note(text: str) -> None:
        say(f"retriever: {text} ({time.monotonic() - started:.1f} s)")

    def opened() -> Retriever:
        retriever = Retriever.open(workspace, config, note, part)
        share = "" if part == (0, 1) else f" (part {part[0] + 1} of {part[1]})"
        note(f"{retriever.facts['rows']:,} passages{share} at {url}")
        retriever.watch_reranking(service.metrics.reranked)
        service.metrics.watch_index(lambda: another(workspace, retriever.facts["manifests"]["index"]))
        return retriever

    note(f"listening at {url}, opening {workspace.folder('index')}")
    service = RetrieverService(opened, config, token, lambda: standing(workspace))
    if config.log_requests:
        service.gateway.request_log = RequestLog(sys.stdout)
    faulthandler.enable()  # a mapped file that is cut short between two looks at its size still leaves a trace of where
    server = DrainingServer(
        options(service, config),
        drain=service.drain,
        active=lambda: service.gateway.active,
        drain_s=config.drain_s,
        failed=service.check_files,
    )
    server.run(sockets=[listener])
    if service.gateway.request_log:
        service.gateway.request_log.close()
    if service.failure:
        raise service.failure


def options(service: RetrieverService, config: RetrieverConfig) -> uvicorn.Config:
    """Return how uvicorn runs the service."""
    protocol = bounded(min(config.max_connections, file_limit()), service.metrics.refused)
    return uvicorn.Config(
        service.gateway,
        log_level="warning",
        access_log=False,
        # When uvicorn is told to end, the draining server has waited for the answers already.
        timeout_graceful_shutdown=1,
        lifespan="on",
        http=protocol,
        # What a client writes into X-Forwarded-For must not decide which network it is in.
        proxy_headers=False,
    )


def another(workspace: Workspace, served: str) -> bool:
    """Whether the workspace holds another index than the one that is served; none at all is one that is being published."""
    standing = manifest.found(workspace.folder("index"), verify=False)
    return standing is not None and standing.hash != served


def standing(workspace: Workspace) -> str | None:
    """Return the hash of the index that can be opened now: None while it, or what it was built from, is missing or being replaced."""
    index = manifest.found(workspace.folder("index"), verify=False)
    if index is None:
        return None
    parents = {name: manifest.found(workspace.folder(name), verify=False) for name in index.parents}
    whole = all(parent is not None and parent.hash == index.parents[name] for name, parent in parents.items())
    return index.hash if whole else None
