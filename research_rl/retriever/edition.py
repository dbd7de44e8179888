"""One opened index with what answers from it, and when the next one takes its place. Knows no HTTP.

Invariants: (1) a request is answered from one edition, from its first piece to its last; (2) an edition ends when the next one has
taken its place and no request holds it any more; (3) whatever fails, the edition in service stays, and an index that could not be
opened is tried again ever more rarely.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from research_rl.config import RetrieverConfig
from research_rl.errors import ResearchError
from research_rl.reranking import RERANKER
from research_rl.retriever.batching import MicroBatcher, Watch
from research_rl.retriever.cache import ResultCache
from research_rl.retriever.retriever import Retriever

__all__ = ["Edition", "Follower", "Newer"]

_LONGEST_PAUSE_S = 3600.0
_LOG = logging.getLogger("research_rl.retriever")


class Edition:
    """A retriever, the thread that searches it and its newest results. `held`, `retire` and `users` belong to the event loop's thread."""

    def __init__(self, retriever: Retriever, config: RetrieverConfig, watch: Watch) -> None:
        self.retriever = retriever
        self.batcher = MicroBatcher(retriever.search, config.max_batch, config.max_queue, watch)
        # A reply that was cut short by the reranker's budget is one of the moment, not one to keep.
        budget = retriever.facts.get(RERANKER, {}).get("budget_ms")
        self.cache = ResultCache(config.cache_entries if budget is None else 0)
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self._users, self._retired = 0, False

    @property
    def index(self) -> str:
        """Hash of the index that is served."""
        return str(self.retriever.facts["manifests"]["index"])

    @contextmanager
    def held(self) -> Generator[None]:
        """Keep the edition open for one request."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._end_unused()

    def retire(self) -> None:
        """End it once no request holds it."""
        self._retired = True
        self._end_unused()

    def close(self) -> None:
        """Finish what waits, end the search thread and close the files."""
        self.batcher.close()
        self.retriever.close()

    def _end_unused(self) -> None:
        if self._retired and not self._users:
            # In a thread: a search whose caller left may still run, and the event loop must not wait for it.
            threading.Thread(target=self.close, name="retired", daemon=True).start()


class Newer:
    """Notes of the exchange: which index is due to be opened, which one could not be, and why.

    `standing` returns the hash of the index that can be opened now, None where there is none; `served` that of the one in service.
    """

    def __init__(self, every_s: float, standing: Callable[[], str | None], served: Callable[[], str | None]) -> None:
        self._every_s, self._standing, self._served = every_s, standing, served
        self.switches = self.failures = 0
        self.failed: dict[str, Any] | None = None
        """The index that could not be opened, when and why; None once one could."""
        self._given = ""
        self._refused, self._tries, self._due = "", 0, 0.0

    def due(self) -> str | None:
        """Return the hash of an index that is to be opened now, None while there is none."""
        index = self._standing()
        served = self._served()
        # What was handed over may not be in service yet.
        if index is None or served is None or index in (served, self._given):
            return None
        return None if index == self._refused and time.monotonic() < self._due else index

    def took(self, index: str) -> None:
        """Count an index that was opened."""
        self.switches, self.failed, self._refused, self._given = self.switches + 1, None, "", index

    def refuse(self, index: str, error: Exception) -> None:
        """Note why an index could not be opened; it is due again later."""
        self._tries = self._tries + 1 if index == self._refused else 1
        pause = min(self._every_s * 2**self._tries, _LONGEST_PAUSE_S)
        self._refused, self._due = index, time.monotonic() + pause
        self.failures += 1
        reason = str(error) if isinstance(error, ResearchError) else f"{type(error).__name__}: {error}"
        self.failed = {"index": index, "at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
        _LOG.error("index %s does not serve: %s; the one in service stays, and it is tried again in %g s", index[:12], reason, pause)


class Follower(Newer):
    """Looks every `every_s` seconds for another index than the one in service, opens it and hands it over.

    `take` is given the opened one, in the follower's thread.
    """

    def __init__(
        self,
        every_s: float,
        standing: Callable[[], str | None],
        served: Callable[[], str | None],
        opened: Callable[[], Edition],
        take: Callable[[Edition], None],
    ) -> None:
        super().__init__(every_s, standing, served)
        self._opened, self._take = opened, take
        self._ended = threading.Event()

    def start(self) -> None:
        """Follow until `end`, in a thread that holds up no end of the process: opening an index cannot be interrupted."""
        if self._every_s:
            threading.Thread(target=self._run, name="follower", daemon=True).start()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def step(self) -> None:
        """Look once, and switch where another index stands."""
        if (index := self.due()) is None:
            return
        try:
            edition = self._opened()
        except Exception as error:  # noqa: BLE001  (the boundary of this thread: whatever it is, the index in service stays)
            self.refuse(index, error)
            return
        self.took(index)
        self._take(edition)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.step()
