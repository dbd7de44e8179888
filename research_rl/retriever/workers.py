"""Run the service in several processes: on one port, with one index in memory. Knows what is opened and served; leaves forks to `crew`.

This process opens nothing. A keeper opens the index and is forked into the workers, each with an event loop, a search thread and threads
of its libraries; another index gets another keeper. Invariants: as those of `server`, and (1) a worker takes its first connection when
it has found the canary; (2) until the first do, a process without an index says so; (3) counts and /info are of the service as a whole.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from research_rl.config import RetrieverConfig
from research_rl.errors import ResearchError, ServiceError
from research_rl.pipeline.extras import missing_extras
from research_rl.pipeline.stages import Workspace
from research_rl.process.board import Board
from research_rl.process.channel import Channel
from research_rl.process.cores import share_cores
from research_rl.process.crew import Supervisor
from research_rl.process.forks import failed, in_a_thread
from research_rl.process.sharing import ProcessShare, SharingServer
from research_rl.retriever.app import RetrieverService
from research_rl.retriever.edition import Newer
from research_rl.retriever.observe import RequestLog
from research_rl.retriever.retriever import Retriever
from research_rl.retriever.server import another, options, standing
from research_rl.retriever.whole import COUNTS, Whole
from research_rl.terminal import say

__all__ = ["run"]

_WAITING = 2048
"""Connections that wait to be taken, as uvicorn has it."""
_CLOSE_S = 5.0
"""What a worker needs after `retriever.drain_s` to close its index and end."""
_GENERATIONS = 4
"""For how many times the workers there is place on the board: those that make room may still answer when the next do, too."""


def run(
    listener: socket.socket, url: str, config: RetrieverConfig, workspace: Workspace, token: str | None, part: tuple[int, int] = (0, 1)
) -> None:
    """Serve on a bound socket until a signal. Raises ManifestError, ModelError or ConfigError when the index cannot be opened."""
    folder = Path(os.environ[COUNTS])
    try:
        listener.listen(_WAITING)
        listener.setblocking(False)
        share_cores(config.workers)
        board = Board(_GENERATIONS * config.workers)
        number = Supervisor(_Crew(listener, url, config, workspace, token, part, Whole(folder, board), board), board).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # As uvicorn does it: a process that was ended by a signal says so to its parent.
    signal.raise_signal(number)


class _Crew:
    """The retriever's part in a `Crew`."""

    def __init__(
        self,
        listener: socket.socket,
        url: str,
        config: RetrieverConfig,
        workspace: Workspace,
        token: str | None,
        part: tuple[int, int],
        whole: Whole,
        board: Board,
    ) -> None:
        self.workers, self.grace_s = config.workers, config.drain_s + _CLOSE_S
        self._listener, self._url, self._config, self._workspace = listener, url, config, workspace
        self._token, self._part, self._whole, self._board = token, part, whole, board
        self._started, self._since = time.monotonic(), ""
        self._served: str | None = None
        self._wanted = ""
        self._newer = Newer(config.follow_s, lambda: standing(workspace), lambda: self._served)
        self._look_at = 0.0
        self._tell()
        self._say(f"listening at {url}, opening {workspace.folder('index')}")

    def herald(self, channel: Channel, place: int) -> None:
        """Say that the index is being opened, until it is."""
        channel.send(pid=os.getpid())
        self._run(RetrieverService(_never, self._config, self._token, whole=self._whole), channel, place)

    def open(self) -> Retriever:
        """Return an index that was not searched yet. Raises ResearchError."""
        try:
            with missing_extras():
                retriever = Retriever.load(self._workspace, self._config, self._say, self._part)
                retriever.require_standing(self._workspace)
        except ResearchError:
            raise
        except Exception as error:
            raise ServiceError(f"the index cannot be opened ({type(error).__name__}: {error}); mend that and start again") from error
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        return retriever

    def name(self, opened: Retriever) -> str:
        """Return the hash of the index."""
        return str(opened.facts["manifests"]["index"])

    def work(self, opened: Retriever, channel: Channel, place: int) -> None:
        """Prove the index and answer searches."""
        channel.send(pid=os.getpid())

        def proved() -> Retriever:
            opened.prove(self._config)
            return opened

        service = RetrieverService(proved, self._config, self._token, whole=self._whole)
        opened.watch_reranking(service.metrics.reranked)
        service.metrics.watch_index(lambda: another(self._workspace, self.name(opened)))
        try:
            service.open_now(in_a_thread, self._since)
        except Exception as error:  # noqa: BLE001  (the boundary of this process: the parent is told, whatever it is)
            channel.send(**failed(error))
            return
        faulthandler.enable()  # a mapped file that is cut short between two looks at its size still leaves a trace of where
        self._run(service, channel, place)
        if service.failure:
            channel.send(**failed(service.failure))

    def has_newer(self) -> bool:
        """Whether another index stands in the workspace than the one in service."""
        if not self._config.follow_s or (now := time.monotonic()) < self._look_at:
            return False
        self._look_at = now + self._config.follow_s
        self._wanted = self._newer.due() or ""
        return bool(self._wanted)

    def took(self, name: str) -> None:
        """Say that all workers serve an index."""
        if self._served not in (None, name):
            self._newer.took(name)
        self._served = name
        self._tell()
        self._say(f"index {name[:12]} at {self._url}, {self.workers} workers")

    def refused(self, error: ResearchError) -> None:
        """Note why an index is not served."""
        self._newer.refuse(self._wanted or str(self._served), error)
        self._tell()

    def ended(self, pid: int) -> None:
        """Keep what a worker counted."""
        self._whole.ended(pid)

    def _run(self, service: RetrieverService, channel: Channel, place: int) -> None:
        if self._config.log_requests:
            service.gateway.request_log = RequestLog(sys.stdout, partial(self._whole.locked, "log"))
        SharingServer(
            options(service, self._config),
            ProcessShare(self._listener, self._board, place, channel),
            retire=service.leave,
            idle=lambda: service.idle,
            drain=service.drain,
            active=lambda: service.gateway.active,
            drain_s=self._config.drain_s,
            failed=lambda: _failed(service),
        ).run()
        if service.gateway.request_log:
            service.gateway.request_log.close()

    def _tell(self) -> None:
        self._whole.tell(switches=self._newer.switches, failures=self._newer.failures, failed=self._newer.failed)

    def _say(self, text: str) -> None:
        say(f"retriever: {text} ({time.monotonic() - self._started:.1f} s)")


def _never() -> Retriever:
    threading.Event().wait()
    raise AssertionError("nobody sets this event")


def _failed(service: RetrieverService) -> bool:
    service.metrics.refresh()
    return service.check_files()
