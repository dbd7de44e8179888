"""What a workspace's questions are answered with: its policy, its index and two servers. Knows processes and clients.

Invariants: (1) a server that was started here and ended, or was silent for minutes, is started again, and the next question asks the new
one; (2) servers started here end with this process; (3) the policy is the one that was chosen, which the model server's name proves; (4) a
question is answered from its first to its last token by the policy that it began with, while that one's server is kept.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Self

from research_rl.agent.answering import Backend, Lease
from research_rl.agent.chosen import Chosen
from research_rl.agent.rounds import rounds
from research_rl.agent.standing import Standing
from research_rl.config import Config, located
from research_rl.episode.agent import SearchFailure
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.errors import ResearchError, ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process import services
from research_rl.process.services import Endpoint

if TYPE_CHECKING:
    from research_rl.retriever.client import RetrieverClient
    from research_rl.serving.client import HttpEngine

__all__ = ["Policy", "SecondPolicy", "Server", "Servers", "WorkspaceSource", "free_name", "policy_folder", "servers"]

_EVERY_S = 2.0
_SILENT_S = 180.0
"""How long a server that runs may leave every health check unanswered before it is ended and started again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LOG = logging.getLogger("research_rl.agent")
Note = Callable[[str], None]
Starts = Callable[[], AbstractContextManager[Endpoint]]


def policy_folder(workspace: Workspace, model: Path | None) -> Path:
    """Return the model folder that answers: the trained policy unless another is named."""
    return (model or workspace.folder("export")).resolve()


class Server:
    """One server as it stands now; `check` starts it again when it ended. Safe to use from several threads.

    `pid` is folder and name of its pid file; None for a server of somebody else, which is only asked.
    """

    def __init__(self, name: str, start: Starts, pid: tuple[Path, str] | None, note: Note) -> None:
        self.name, self._start, self._pid, self._note = name, start, pid, note
        self._stack: ExitStack | None = None
        self._endpoint: Endpoint | None = None
        self._pause, self._due, self.closed = _FIRST_PAUSE_S, 0.0, False
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers, or did before it ended."""
        assert self._endpoint, "open the server before it is asked"
        return self._endpoint

    def open(self) -> None:
        """Start it. Raises ConfigError, ServiceError, ModelError or ManifestError."""
        with self._lock:
            self._enter()

    def close(self) -> None:
        """End what was started here, also while it starts; it is not started again."""
        # Set before the lock is taken: whoever holds it or waits for it then starts nothing more.
        self.closed = True
        if not self._lock.acquire(blocking=False):
            # Whoever starts it waits for its first answer: without its process that wait is over.
            if self._pid and (process := services.find(*self._pid)):
                process.terminate()
            self._lock.acquire()
        try:
            self._leave()
        finally:
            self._lock.release()

    def check(self) -> bool:
        """Start it again if it ended; return whether it was. A start that fails is tried again ever more rarely."""
        with self._lock:
            return self._pid is not None and not self.closed and self._ended() and self._again()

    def end(self) -> None:
        """End what runs here because it does not answer; the next `check` starts it again."""
        with self._lock:
            if self._pid is not None and not self.closed:
                _LOG.error("the %s runs and does not answer; it is ended", self.name)
                self._leave()

    def _ended(self) -> bool:
        # Not by the pid file: another container that shares the workspace knows no process of this one, and may remove or replace it.
        process = self._endpoint.process if self._endpoint and self._stack else None
        return process is None or process.poll() is not None

    def _again(self) -> bool:
        if time.monotonic() < self._due:
            return False
        if self._endpoint:
            _LOG.warning("the %s ended; it is started again", self.name)
        self._leave()
        try:
            self._enter()
        # A full disk, for one, may have room when it is tried again.
        except (ResearchError, OSError) as error:
            _LOG.error("the %s cannot be started: %s", self.name, error)
            return False
        finally:
            # Never reset, but counted from the last start: a server that runs for an hour and ends is started again at once.
            self._due = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        return True

    def _enter(self) -> None:
        if self.closed:
            raise ServiceError(f"the {self.name} is not started: the service ends")
        started = time.monotonic()
        self._note(f"starting the {self.name}" if self._pid else f"asking the {self.name}")
        with ExitStack() as stack:
            self._endpoint = stack.enter_context(self._start())
            self._stack = stack.pop_all()
        self._note(f"the {self.name} answers after {time.monotonic() - started:.1f} s")

    def _leave(self) -> None:
        stack, self._stack = self._stack, None
        if stack:
            stack.close()


class Servers:
    """The retriever and the model server of a service; more model servers can be started beside the first one."""

    def __init__(self, config: Config, workspace: Workspace, chosen: Chosen, note: Note, name: str) -> None:
        from research_rl.retriever.command import running as retriever_running

        # Apart from the services of a run, which may go on in the same workspace.
        folder, own = _folder(workspace, name), not (config.retriever.url or config.retriever.urls)
        pid = (folder, "retriever") if own else None
        self.retriever = Server("retriever", lambda: retriever_running(config, workspace, folder=folder), pid, note)
        self._config, self._workspace, self._note, self._name = config, workspace, note, name
        self.model = self._model_server(config, chosen, _model_name(name), "model server")
        self._beside: dict[str, Server] = {}

    def beside(self, chosen: Chosen, title: str) -> Server:
        """Return a server for another model, with a name and a port of its own; it is not started yet."""
        # `serving.port` belongs to the first one.
        config = self._config.model_copy(update={"serving": self._config.serving.model_copy(update={"port": 0, "url": None})})
        names = (f"{self._name}-model-{number}" for number in count(2))
        name = next(name for name in names if name not in self._beside or self._beside[name].closed)
        self._beside[name] = self._model_server(config, chosen, name, title)
        return self._beside[name]

    def open(self) -> None:
        """Start both. Raises ConfigError, ServiceError, ModelError or ManifestError."""
        # A missing index is told before minutes are spent on loading a model.
        self.retriever.open()
        self.model.open()

    def close(self) -> None:
        """End all that was started here."""
        for server in (self.retriever, self.model, *self._beside.values()):
            server.close()

    def _model_server(self, config: Config, chosen: Chosen, name: str, title: str) -> Server:
        from research_rl.serving.serve import running as model_running

        @contextmanager
        def start() -> Generator[Endpoint]:
            with model_running(config, self._workspace, chosen.place(), name=name) as endpoint:
                yield endpoint

        return Server(title, start, None if config.serving.url else (self._workspace.services, name), self._note)


def _folder(workspace: Workspace, name: str) -> Path:
    return workspace.root / ".serving" / name


def _model_name(name: str) -> str:
    return f"{name}-model"


def free_name(workspace: Workspace, name: str) -> str:
    """Return `name`, or the first of `name-2`, `name-3`, ... under which no servers run here: each terminal has its own."""

    def taken(name: str) -> bool:
        processes = ((_folder(workspace, name), "retriever"), (workspace.services, _model_name(name)))
        return any(services.find(*process) for process in processes)

    return next(each for each in chain([name], (f"{name}-{number}" for number in count(2))) if not taken(each))


@contextmanager
def servers(config: Config, workspace: Workspace, chosen: Chosen, note: Note, name: str) -> Generator[Servers]:
    """Start the retriever and the model server for a block, or use those of `retriever.url` and `serving.url`."""
    started = Servers(located(config, workspace.root), workspace, chosen, note, name)
    try:
        started.open()
        yield started
    finally:
        started.close()


class Policy:
    """One model that answers: its server, a client for it, its tokenizer, and how many questions it answers now."""

    def __init__(self, config: Config, chosen: Chosen, server: Server, connections: int) -> None:
        self.chosen, self.server = chosen, server
        self.questions = 0
        self.since = time.time()
        self._config, self._connections = config, connections
        # Not by `load_tokenizer`, which remembers folders: the next training may put another model into this one.
        self._tokenizer = FolderTokenizer(chosen.place())
        self._clients = AsyncExitStack()
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine: HttpEngine | None = None

    @property
    def engine(self) -> HttpEngine:
        """The client for its server."""
        assert self._engine, "connect the policy before it is asked"
        return self._engine

    async def connect(self) -> None:
        """Make a client for the server as it stands now; those of earlier questions stay open until the end."""
        from research_rl.serving.client import HttpEngine, Sampling

        config = self._config
        # As in the evaluation, so that its numbers speak of the answers that are given here.
        sampling = Sampling(config.evaluation.temperature, config.evaluation.seed)
        engine = HttpEngine(
            self.server.endpoint, sampling, engine=config.serving.engine, timeout_s=config.episode.wall_s, connections=self._connections
        )
        self._engine = await self._clients.enter_async_context(engine)

    async def close(self) -> None:
        """Close the clients."""
        await self._clients.aclose()

    def backend(self, searcher: RetrieverClient) -> Backend:
        """Return what a question is answered with."""
        model = self.server.endpoint.model or "policy"
        return Backend(self.engine, searcher, self._tokenizer, self._prompt, model, (self._tokenizer.eos_token,), self.chosen.name)

    def lease(self, searcher: RetrieverClient) -> Lease:
        """Return the same for one question, which is counted until it is over."""
        self.questions += 1
        self._idle.clear()
        return Lease(self.backend(searcher), self._over)

    def _over(self) -> None:
        self.questions -= 1
        if not self.questions:
            self._idle.set()

    async def drained(self, seconds: float) -> int:
        """Wait until no question is answered any more, for at most `seconds`; return how many still are."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self.questions

    def _prompt(self, question: str) -> list[int]:
        return encode_prompt(self._tokenizer, question, self._config.prompt)


class WorkspaceSource:
    """A `BackendSource` over running servers, for one event loop: clients for them, and a watch that starts again what ended."""

    def __init__(self, config: Config, workspace: Workspace, chosen: Chosen, running: Servers, connections: int) -> None:
        self.workspace = workspace
        self._config, self._running, self._connections = located(config, workspace.root), running, connections
        self._policy = Policy(self._config, chosen, running.model, connections)
        self._clients = AsyncExitStack()
        self._searcher: RetrieverClient | None = None
        self._heard: dict[Server, float] = {}
        self._ending = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Open the clients and begin to watch the servers."""
        await self._policy.connect()
        await self._connect_retriever()
        # Each by itself: a model server that takes minutes to start must not hide that the retriever ended.
        watched = (("retriever", self._watch_retriever), ("model server", self._watch_model))
        self._watching = [asyncio.create_task(rounds(f"watching the {name}", look, _EVERY_S, self._ending)) for name, look in watched]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the clients. A server that is being started is waited for."""
        self._ending.set()
        # Not cancelled: the thread that starts a server would go on without its task.
        await asyncio.gather(*self._watching)
        await self._policy.close()
        await self._clients.aclose()

    @property
    def searcher(self) -> RetrieverClient:
        """The client for the retriever."""
        assert self._searcher, "open the source before a question is asked"
        return self._searcher

    @property
    def chosen(self) -> Chosen:
        """The model that answers the next question."""
        return self._policy.chosen

    @property
    def backend(self) -> Backend:
        """What the next question is answered with."""
        return self._policy.backend(self.searcher)

    def lease(self) -> Lease:
        """Return the same for one question, whose model is kept until the question is over."""
        return self._policy.lease(self.searcher)

    def standing(self) -> Standing:
        """Return what is served, and since when."""
        return Standing(self.backend.model, self.chosen.name, self._policy.since)

    async def trouble(self) -> str | None:
        """Return which server does not answer; None when both do."""
        works, health = await asyncio.gather(self._policy.engine.works(), self.searcher.health())
        if not works:
            return "the model server does not answer"
        return f"the retriever does not answer ({health.reason})" if isinstance(health, SearchFailure) else None

    async def switch(self, chosen: Chosen, check: Callable[[Backend], Awaitable[None]], drain_s: float) -> int:
        """Answer new questions with `chosen`, once `check` accepted it; return after the old model server was ended.

        That is when its last question was answered, or after `drain_s` seconds; the number of questions that it still answered then is
        returned. Raises ResearchError when the new one cannot be used; the old one then stays.
        """
        fresh = await self._started(chosen, check)
        fresh.since = time.time()
        # From here on leases are of the new model; questions that hold a lease of the old one are waited for.
        old, self._policy = self._policy, fresh
        left = await old.drained(drain_s)
        await asyncio.to_thread(old.server.close)
        await old.close()
        return left

    async def _started(self, chosen: Chosen, check: Callable[[Backend], Awaitable[None]]) -> Policy:
        server = self._running.beside(chosen, f"model server of {chosen.name}")
        fresh: Policy | None = None
        try:
            # In a thread: reading a tokenizer takes a second, in which every other answer would wait.
            fresh = await asyncio.to_thread(Policy, self._config, chosen, server, self._connections)
            await asyncio.to_thread(server.open)
            await fresh.connect()
            await check(fresh.backend(self.searcher))
        # A service that ends meanwhile cancels this, too, and the new model server must not outlive the attempt.
        except BaseException:
            await asyncio.to_thread(server.close)
            if fresh:
                await fresh.close()
            raise
        return fresh

    async def _connect_retriever(self) -> None:
        """Make a client for the retriever; that of earlier questions stays open until the end."""
        from research_rl.retriever.client import RetrieverClient

        endpoint = self._running.retriever.endpoint
        client = RetrieverClient(endpoint.url, endpoint.token, self._config.episode.search_timeout_s, connections=self._connections)
        self._searcher = await self._clients.enter_async_context(client)

    async def _watch_retriever(self) -> None:
        if await asyncio.to_thread(self._running.retriever.check):
            await self._connect_retriever()
        await self._end_silent(self._running.retriever, not isinstance(await self.searcher.health(), SearchFailure))

    async def _watch_model(self) -> None:
        policy = self._policy
        # A policy that was replaced meanwhile has closed its clients.
        if await asyncio.to_thread(policy.server.check) and policy is self._policy:
            await policy.connect()
        if policy is self._policy:
            await self._end_silent(policy.server, await policy.engine.works())

    async def _end_silent(self, server: Server, answers: bool) -> None:
        now = time.monotonic()
        # The first look starts a server's time, so that one just started again is not held to the silence of the one before.
        if answers or server not in self._heard:
            self._heard[server] = now
        elif now - self._heard[server] > _SILENT_S:
            del self._heard[server]
            await asyncio.to_thread(server.end)


class SecondPolicy:
    """A `Challenger` beside the policy of a source: started in the background, and again whenever it ends."""

    def __init__(self, config: Config, chosen: Chosen, source: WorkspaceSource, running: Servers) -> None:
        self._source = source
        self._server = running.beside(chosen, f"model server of the challenger {chosen.name}")
        # One question at a time is played by it.
        self._policy = Policy(located(config, source.workspace.root), chosen, self._server, 1)
        self._ready = False

    async def __aenter__(self) -> Self:
        """Begin to start it."""
        what = f"watching the {self._server.name}"
        self._watching = asyncio.create_task(rounds(what, self._watch, _EVERY_S, at_once=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        """End it, also while it starts."""
        # The thread that may be starting the server cannot be cancelled; closing the server ends its wait.
        self._watching.cancel()
        await asyncio.to_thread(self._server.close)
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._policy.close()

    @property
    def backend(self) -> Backend | None:
        """What it answers with; None until it was started."""
        return self._policy.backend(self._source.searcher) if self._ready else None

    async def _watch(self) -> None:
        if await asyncio.to_thread(self._server.check):
            await self._policy.connect()
            self._ready = True
