"""Start, watch and stop the processes a run needs. Knows processes, ports and health addresses; knows no service.

Invariants: (1) a started process and all its descendants end with the process that started them, even when that one
is killed (`_guardian.py`), unless it was started `detached`; (2) every running process has a pid file, written before it is waited
for and removed after its end; (3) `reap` ends what a process that is gone left behind: never what a living one still owns, never
a process that was not started here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from research_rl.errors import ServiceError
from research_rl.paths import PYTHON
from research_rl.process.identity import Identity
from research_rl.process.private import write_private
from research_rl.process.proxies import bypass_loopback, httpx_options

__all__ = [
    "Endpoint",
    "Process",
    "Recorded",
    "Watched",
    "base_url",
    "find",
    "free_port",
    "free_ports",
    "guarded",
    "listening",
    "reap",
    "require_free",
    "running",
    "spawn",
    "wait_healthy",
]

_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to connections: none of these takes one before the server that it was drawn for binds it."""
_GUARDIAN = Path(__file__).with_name("_guardian.py")
_MARKER = "RESEARCH_SERVICE_ID"
_GRACE = "RESEARCH_GRACE_S"
_GRACE_S = 10.0
_KILL_AFTER_S = 10.0
"""How long after its grace period a guardian itself is given before it is killed."""
# Addresses to bind that mean every interface; no client can connect to them.
_ANY = ("", "0.0.0.0", "::")


class Watched(Protocol):
    """A process whose end and log can be read."""

    name: str
    log: Path

    def poll(self) -> int | None:
        """Return the exit code, None while running."""
        ...

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """Where a service answers: base address, bearer token, and of a served model its name and the number of its tokens, where known.

    `process` is what runs behind it where this process started that.
    """

    url: str
    token: str | None = None
    model: str | None = None
    vocabulary: int | None = None
    process: Watched | None = field(default=None, compare=False, repr=False)


@dataclass
class Process:
    """A command that this process started: `popen` is its guardian (or itself when detached), `log` holds its output."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    pid_file: Path
    grace_s: float

    def poll(self) -> int | None:
        """Return the exit code, None while running."""
        return self.popen.poll()

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        return _tail(self.log, lines)

    def stop(self) -> int:
        """End the command and all its descendants; return the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            code = self.popen.wait(self.grace_s + _KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            # First the descendants: once the guardian is killed nothing else would end them.
            if record := _read(self.pid_file):
                _end(record)
            self.popen.kill()
            code = self.popen.wait()
        if self.popen.stdin:
            self.popen.stdin.close()
        self.pid_file.unlink(missing_ok=True)
        return code


@dataclass
class Recorded:
    """A running command that another process started, known by its pid file. Its exit code cannot be read: -1 stands for ended."""

    name: str
    identity: Identity
    log: Path

    def poll(self) -> int | None:
        """Return -1 once it has ended, None while running."""
        return None if self.identity.alive() else -1

    def terminate(self) -> None:
        """Ask it to end, if it still runs."""
        if self.identity.alive():
            with suppress(ProcessLookupError):
                os.kill(self.identity.pid, signal.SIGTERM)

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        return _tail(self.log, lines)


def spawn(
    name: str,
    command: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    grace_s: float | None = None,
    detached: bool = False,
) -> Process:
    """Start `command` in its own session under a guardian; its output is appended to `log` (`folder/<name>.log`).

    `env` is added to this process's environment. `grace_s` is the time from SIGTERM to SIGKILL, by default RESEARCH_GRACE_S, else
    10 s. A detached command has no guardian and outlives this process. Raises ServiceError when a process of that name already runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid_file = folder / f"{name}.pid"
    if find(folder, name):
        raise ServiceError(f"{name} already runs ({pid_file}); stop it with `make down` or use another workspace")
    marker, log = uuid.uuid4().hex, log or folder / f"{name}.log"
    whole_env, grace_s = _environment(env or {}, marker, grace_s, detached)
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command if detached else [PYTHON, "-I", "-S", str(_GUARDIAN), *command],
            # Nothing is ever written to the pipe: it closes when this process ends, however that happens, and the guardian waits for that.
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal reaches this process alone, which then ends its services in order.
            start_new_session=True,
            cwd=cwd,
            env=whole_env,
        )
    owner = None if detached else Identity.own().to_json()
    # A command that ended at once has no identity any more; its record must still name its marker, by which its orphans are known.
    started = Identity.of(popen.pid) or Identity(popen.pid, 0, "")
    record = {**started.to_json(), "marker": marker, "grace_s": grace_s, "owner": owner, "command": list(command)}
    write_private(pid_file, json.dumps(record))
    return Process(name, popen, log, pid_file, grace_s)


def _environment(env: Mapping[str, str], marker: str, grace_s: float | None, detached: bool) -> tuple[dict[str, str], float]:
    """Return the environment of a command and its grace period, in seconds."""
    whole = {**os.environ, **env, _MARKER: marker}
    grace_s = float(whole.get(_GRACE, _GRACE_S)) if grace_s is None else grace_s
    # A detached command has no guardian; the grace period would go to guardians that it starts for other commands.
    return whole | bypass_loopback(whole) | ({} if detached else {_GRACE: str(grace_s)}), grace_s


@contextmanager
def guarded(
    name: str,
    command: Sequence[str],
    *,
    folder: Path,
    health_url: str,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    grace_s: float | None = None,
) -> Generator[Process]:
    """Run a service for the length of a block: start, wait until `health_url` answers 200, stop on any exit.

    Raises ServiceError with the last log lines when it ends or stays silent until the deadline.
    """
    process = spawn(name, command, folder=folder, env=env, grace_s=grace_s)
    try:
        wait_healthy(process, health_url, deadline_s)
        yield process
    finally:
        process.stop()


def wait_healthy(process: Watched, health_url: str, deadline_s: float) -> None:
    """Return once `health_url` answers 200. Raises ServiceError."""
    deadline = time.monotonic() + deadline_s
    # One client for all tries: making one reads all certificates, which would take a good part of the processor from the service.
    with httpx.Client(timeout=5.0, **httpx_options()) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(health_url).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    why = f"is silent after {deadline_s:g} s at {health_url}" if process.poll() is None else f"ended with code {process.poll()}"
    raise ServiceError(f"{process.name} {why}; its log {process.log} ends with:\n{process.tail()}")


def base_url(host: str, port: int) -> str:
    """Return the address at which this machine reaches a server that binds `host`."""
    if host in _ANY:
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that was free a moment ago. Raises ServiceError when none is."""
    return free_ports(1, host)[0]


def free_ports(number: int, host: str = "127.0.0.1") -> list[int]:
    """Return different TCP ports that were free a moment ago. Raises ServiceError when too few are."""
    found: list[int] = []
    # Of its own: processes that gave `random` the same seed must not draw the same ports.
    for port in random.Random().sample(_PORTS, len(_PORTS)):
        with socket.socket(_family(host)) as probe, suppress(OSError):
            probe.bind((host, port))
            found.append(port)
        if len(found) == number:
            return found
    limits = f"from {_PORTS.start} to {_PORTS.stop - 1}"
    raise ServiceError(f"{host} has {len(found)} free ports {limits}, {number} are needed; end what listens there")


def require_free(host: str, port: int, setting: str) -> int:
    """Return `port`, or a free one for 0. Raises ServiceError when something listens there already."""
    with socket.socket(_family(host)) as probe:
        # As servers do: without it a port counts as taken for a minute after its last connection closed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"{setting}={port} on {host} cannot be bound ({error.strerror}); set {setting} to a free port or to 0"
            ) from None
    return port or free_port(host)


@contextmanager
def listening(host: str, port: int, setting: str) -> Generator[socket.socket]:
    """Hold a port for the block, so that one in use is told before a long start. Raises ServiceError."""
    # asyncio switches off Nagle's delay (40 ms a reply) only where the protocol is named.
    with socket.socket(_family(host), socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"{setting}={port} on {host} cannot be bound ({error.strerror}); "
                f"set {setting} to a free port or to 0, or stop what listens there"
            ) from None
        yield listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def find(folder: Path, name: str) -> Recorded | None:
    """Return the running process of that name, None when there is none."""
    record = _read(folder / f"{name}.pid")
    return Recorded(name, record.process, folder / f"{name}.log") if record and record.process.alive() else None


def running(folder: Path) -> set[str]:
    """Return the names of the processes with a pid file in `folder` that run now."""
    return {path.stem for path in folder.glob("*.pid") if find(folder, path.stem)}


def reap(folder: Path) -> list[str]:
    """End every process named by a pid file in `folder` whose owner is gone; return the names of those that still ran.

    What a living process owns is left alone, together with its pid file; only when its guardian was killed are its orphans ended.
    """
    ended: list[str] = []
    for pid_file in sorted(folder.glob("*.pid")):
        record = _read(pid_file)
        # `research run` in another terminal may own services here.
        if record and record.owned():
            continue
        if record and _end(record):
            ended.append(pid_file.stem)
        pid_file.unlink(missing_ok=True)
    return ended


@dataclass(frozen=True)
class _PidRecord:
    """A pid file: the guardian or detached command, the marker of all its descendants, and who answers for it."""

    process: Identity
    marker: str
    grace_s: float
    owner: Identity | None

    def owned(self) -> bool:
        """Return whether it runs for a process that lives."""
        return self.owner is not None and self.owner.alive() and self.process.alive()


def _read(pid_file: Path) -> _PidRecord | None:
    """Return what a pid file says, None when it is absent or torn."""
    try:
        record = json.loads(pid_file.read_text())
        owner = Identity.from_json(record["owner"]) if record.get("owner") else None
        return _PidRecord(Identity.from_json(record), str(record["marker"]), float(record.get("grace_s", _GRACE_S)), owner)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""


def _end(record: _PidRecord) -> bool:
    """Ask a guardian and all processes that carry its marker or descend from it to end, then kill; return whether any ran."""
    members = _members(record)
    for process in members:
        _send(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(members, timeout=record.grace_s)
    for process in stubborn:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=5.0)
    return bool(members)


def _members(record: _PidRecord) -> list[psutil.Process]:
    members: dict[int, psutil.Process] = {}
    # The tree below the guardian is not enough: a killed guardian's orphans are children of init and known by their marker alone.
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARKER) == record.marker:
                members[process.pid] = process
        # Processes of other users show no environment; they cannot be of this folder.
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    if record.process.alive():
        with suppress(psutil.NoSuchProcess):
            guardian = psutil.Process(record.process.pid)
            members[guardian.pid] = guardian
            members.update({child.pid: child for child in guardian.children(recursive=True)})
    return list(members.values())


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
