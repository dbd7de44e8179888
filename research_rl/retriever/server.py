"""Run the service in this process: listen, open the index, say where it answers, drain on a signal. Knows no search.

Invariants: (1) from SIGTERM on /readyz says 503 and new searches are refused, while what was accepted is answered for up to
`retriever.drain_s`; (2) an index that cannot be opened ends the process with the reason.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
import time
from types import FrameType

import uvicorn

from research_rl.config import RetrieverConfig
from research_rl.pipeline.stages import Workspace
from research_rl.retriever.app import Service
from research_rl.retriever.connections import bounded, file_limit
from research_rl.retriever.observe import RequestLog
from research_rl.retriever.retriever import Retriever

__all__ = ["run"]

_QUIET_S = 0.2
"""How long no request may be under way before a draining service ends: a client may be between two packets."""


def run(
    listener: socket.socket, url: str, config: RetrieverConfig, workspace: Workspace, token: str | None, part: tuple[int, int] = (0, 1)
) -> None:
    """Serve on a bound socket until a signal. Raises ManifestError, ModelError or ConfigError when the index cannot be opened."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"retriever: {text} ({time.monotonic() - started:.1f} s)", flush=True)

    def opened() -> Retriever:
        retriever = Retriever.open(workspace, config, say, part)
        share = "" if part == (0, 1) else f" (part {part[0] + 1} of {part[1]})"
        say(f"{retriever.facts['rows']:,} passages{share} at {url}")
        return retriever

    say(f"listening at {url}, opening {workspace.folder('index')}")
    service = Service(opened, config, token)
    if config.log_requests:
        service.gateway.request_log = RequestLog(sys.stdout)
    faulthandler.enable()  # a mapped file that is cut short between two looks at its size still leaves a trace of where
    protocol = bounded(min(config.max_connections, file_limit()), service.metrics.refused)
    options = uvicorn.Config(
        service.gateway,
        log_level="warning",
        access_log=False,
        # When uvicorn is told to end, `_drained` has waited for the answers already.
        timeout_graceful_shutdown=1,
        lifespan="on",
        http=protocol,
        # What a client writes into X-Forwarded-For must not decide which network it is in.
        proxy_headers=False,
    )
    _Server(options, service).run(sockets=[listener])
    if service.gateway.request_log:
        service.gateway.request_log.close()
    if service.failure:
        raise service.failure


class _Server(uvicorn.Server):
    """Ends when the service has drained, or when its index cannot be opened."""

    def __init__(self, options: uvicorn.Config, service: Service) -> None:
        super().__init__(options)
        self._service = service
        self._until = self._quiet_since = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; a second signal ends at once."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        # uvicorn raises what stands here once more at its end, so that the process ends as by the signal.
        self._captured_signals.append(sig)
        self._service.draining = self._service.gateway.closing = True
        self._until = time.monotonic() + self._service.config.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        self._service.check_files()
        return await super().on_tick(counter) or self._service.failure is not None or self._drained()

    def _drained(self) -> bool:
        now = time.monotonic()
        if self._service.gateway.active or not self._service.draining:
            self._quiet_since = float("inf")
        else:
            self._quiet_since = min(self._quiet_since, now)
        return now >= min(self._quiet_since + _QUIET_S, self._until)
