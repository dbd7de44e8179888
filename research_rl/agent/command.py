"""Run the agent service: start its servers, listen, say where, drain on a signal. Knows processes and files; knows no question.

Invariants: (1) the port is taken before the long start; (2) the token stands in a file for its owner alone and is not printed;
(3) that file is there only while the service runs.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import IN_CHECKOUT
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from research_rl.process.services import base_url, listening
from research_rl.process.tokens import require_token_outside, token_from
from research_rl.terminal import say

if TYPE_CHECKING:
    from research_rl.agent.backend import Servers
    from research_rl.agent.chosen import AliasMemory, Chosen, Fetch
    from research_rl.agent.service import BackendSource
    from research_rl.agent.shadow import Shadow

__all__ = ["NAME", "TOKEN", "Address", "address_file", "recorded_address", "serve"]

TOKEN = "RESEARCH_AGENT_TOKEN"
NAME = "agent"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Address:
    """Where a service answers, its token, and the model it serves."""

    url: str
    token: str | None
    model: str


def address_file(workspace: Workspace) -> Path:
    """Return the file in which a running service says where it answers."""
    return workspace.services / "agent.json"


def recorded_address(workspace: Workspace) -> Address | None:
    """Return what the file of a service says, None when there is none; the service may have been killed since."""
    path = address_file(workspace)
    if not path.is_file():
        return None
    facts = read_object(path, ServiceError, "remove it")
    return Address(str(facts.get("url", "")), facts.get("token"), str(facts.get("model", "")))


def serve(config: Config, workspace: Workspace, fetch: Fetch) -> None:
    """Serve `agent.model` until a signal; `fetch` asks the registry.

    Raises ConfigError, ModelError, ManifestError or ServiceError when it cannot start.
    """
    from research_rl.agent.backend import servers

    started = time.monotonic()
    token = None if config.agent.auth == "none" else token_from(TOKEN)
    require_token_outside("agent", config.agent, token, TOKEN)
    token = token or (secrets.token_urlsafe(24) if config.agent.auth == "token" else None)

    def note(text: str) -> None:
        say(f"agent: {text} ({time.monotonic() - started:.1f} s)")

    host, port = config.agent.host, config.agent.port
    with listening(host, port, "agent.port") as listener:
        host, port = listener.getsockname()[:2]
        plan = _plan(config, workspace, fetch)
        # With the host's name: services on several hosts or in several containers may share a workspace.
        with servers(config, workspace, plan.chosen, note, f"{NAME}-{socket.gethostname()}") as running:
            address = Address(base_url(host, port), token, running.model.endpoint.model or "policy")
            with _recorded(workspace, address) as path:
                where = f"the token, and a link to the page with it, are in {path}" if token else f"page: {address.url}/"
                note(f"{address.model} at {address.url}/v1; {where}; stop with Ctrl-C")
                _run(listener, config, workspace, plan, running, address, note)


@dataclass(frozen=True)
class _Plan:
    """What is served: the model, the alias that it follows (with the memory of it), and a challenger."""

    chosen: Chosen
    alias: str | None
    memory: AliasMemory
    challenger: Chosen | None
    fetch: Fetch

    def ask(self) -> Chosen:
        """Return what the alias names now. Raises ConfigError and ServiceError."""
        from research_rl.agent.chosen import of_alias

        assert self.alias, "an alias is followed"
        return of_alias(self.alias, self.fetch)


def _plan(config: Config, workspace: Workspace, fetch: Fetch) -> _Plan:
    from research_rl.agent.chosen import AliasMemory, alias_of, choose, registered

    agent = config.agent
    alias, memory = alias_of(agent.model), AliasMemory(workspace.root / ".serving" / NAME / "followed.json")
    if alias and config.serving.url:
        raise ConfigError(
            f"serving.url={config.serving.url!r} serves one model, and {agent.model} moves; clear serving.url, or name a version"
        )
    try:
        chosen = choose(agent.model, config, workspace, fetch)
    except ServiceError as error:
        if not alias or not (remembered := memory.recall(alias)):
            raise
        say(f"agent: {error}; {remembered.name}, which {alias} named last, is served", sys.stderr)
        chosen = remembered
    if alias:
        memory.keep(alias, chosen)
    second = choose(registered(agent.shadow, config), config, workspace, fetch, "--shadow") if agent.shadow else None
    return _Plan(chosen, alias, memory, second, fetch)


def _run(
    listener: socket.socket, config: Config, workspace: Workspace, plan: _Plan, running: Servers, address: Address, note: Note
) -> None:
    import uvicorn

    from research_rl.agent.feedback import Delivery, Feedback, feedback_folder
    from research_rl.agent.service import AgentService
    from research_rl.process.connections import bounded
    from research_rl.process.draining import DrainingServer
    from research_rl.process.open_files import file_limit
    from research_rl.process.tracked import send_verdicts
    from research_rl.retriever.observe import RequestLog

    log = RequestLog(sys.stdout)
    source, shadow = _sources(config, workspace, plan, running, address, note)
    folder = feedback_folder(workspace)
    # Only a checkout has the commands that know MLflow; elsewhere verdicts stay in the journal.
    feedback, delivery = Feedback(folder), Delivery(lambda: send_verdicts(workspace.root), folder) if IN_CHECKOUT else None
    service = AgentService(source, config, address.token, log.write, feedback, shadow, delivery)
    options = uvicorn.Config(
        service.app,
        log_level="warning",
        access_log=False,
        # When uvicorn is told to end, the draining server has waited for the answers already.
        timeout_graceful_shutdown=1,
        lifespan="on",
        http=bounded(min(config.agent.max_connections, file_limit()), service.metrics.refused),
        # What a client writes into X-Forwarded-For must not decide which network it is in.
        proxy_headers=False,
    )
    try:
        drain_s = config.agent.drain_s
        server = DrainingServer(options, drain=service.drain, active=lambda: service.requests, drain_s=drain_s, cut=service.cut)
        server.run(sockets=[listener])
    finally:
        log.close()


def _sources(
    config: Config, workspace: Workspace, plan: _Plan, running: Servers, address: Address, note: Note
) -> tuple[BackendSource, Shadow | None]:
    """Return where answers come from, and what plays some questions once more."""
    from research_rl.agent.backend import SecondPolicy, WorkspaceSource
    from research_rl.agent.follow import Following
    from research_rl.agent.shadow import Shadow, shadow_file
    from research_rl.episode.agent import Limits

    source = WorkspaceSource(config, workspace, plan.chosen, running, config.agent.concurrency)
    shadow: Shadow | None = None
    if plan.challenger:
        second = SecondPolicy(config, plan.challenger, source, running)
        shadow = Shadow(second, plan.challenger.name, config.agent.shadow_share, shadow_file(workspace))
        note(f"{plan.challenger.name} plays {config.agent.shadow_share:.0%} of the questions, too; both answers go to {shadow.path}")
    if not (alias := plan.alias):
        return source, shadow

    def moved(chosen: Chosen, model: str) -> None:
        plan.memory.keep(alias, chosen)
        _record(workspace, replace(address, model=model))
        note(f"{alias} is {chosen.name} now: new questions are answered by {model}")

    return Following(source, alias, plan.ask, config.agent, Limits(**config.episode.model_dump()), moved), shadow


@contextmanager
def _recorded(workspace: Workspace, address: Address) -> Generator[Path]:
    path = _record(workspace, address)
    try:
        yield path
    finally:
        # Another service of this workspace may have written its own since.
        if (recorded := recorded_address(workspace)) and recorded.url == address.url:
            path.unlink(missing_ok=True)


def _record(workspace: Workspace, address: Address) -> Path:
    # Behind # the token stays in the browser: it is sent to no server and stands in no log.
    link = f"{address.url}/#{address.token}" if address.token else f"{address.url}/"
    write_private(address_file(workspace), json.dumps({"url": address.url, "token": address.token, "model": address.model, "page": link}))
    return address_file(workspace)
