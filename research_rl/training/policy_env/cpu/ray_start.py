"""Let a slow or busy machine start the private Ray of a run. Imported by the trainer's process before it starts one.

Ray 2.60 gives a node 30 s to register, and its node manager waits 15 s for each of its agents to write down a port; neither can be set.
On a busy machine of two cores the agents' imports alone took 36 s, so that no training began (2026-11-28). Here the agents' ports are
written down for them, the node is waited for as long as it lives, and nothing starts beside it that a run of its own has no use for:
no dashboard, no autoscaler.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
from ray import _raylet as raylet
from ray._private import node, services, utils

__all__: list[str] = []

# An extension module: its types are not published.
_raylet: Any = raylet

_REGISTERED_S = 600.0
_UNUSED = (_raylet.METRICS_AGENT_PORT_NAME, _raylet.METRICS_EXPORT_PORT_NAME, _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME)
_NODE_ID, _SESSION = 2, 11
"""Where `start_raylet` takes the node's id and the session's folder."""


def _patient(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ask` with more patience than the loop around it has: it is asked again while the node that was started here lives."""

    def asked(*arguments: Any) -> Any:
        deadline = time.monotonic() + _REGISTERED_S
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline or not _raylet_lives():
                    raise
                time.sleep(0.1)

    return asked


def _raylet_lives() -> bool:
    return any(child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children())


def _with_ports(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return `start_raylet` that finds the ports of its agents written down before they run: one in use, and -1 as they write it."""

    def started(*arguments: Any, **options: Any) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        where = (arguments[_SESSION], arguments[_NODE_ID])
        _raylet.persist_port(*where, _raylet.RUNTIME_ENV_AGENT_PORT_NAME, port)
        for name in _UNUSED:
            _raylet.persist_port(*where, name, -1)
        return start(*arguments, **{**options, "runtime_env_agent_port": port})

    return started


def _nothing(*_arguments: Any, **_options: Any) -> tuple[None, None]:
    return None, None


def _no_dashboard() -> ImportError:
    return ImportError("this run's Ray has no dashboard")


services.get_node = _patient(services.get_node)
services.start_raylet = _with_ports(services.start_raylet)
services.start_api_server = _nothing
node.Node.start_monitor = lambda self: None
# The agents load few modules where the dashboard's libraries are missing.
utils.get_dashboard_dependency_error = _no_dashboard
