"""Start, watch and stop the processes a run needs. Knows processes, ports and health addresses; knows no service.

Invariants: (1) a started process and all its descendants end with the process that started them, even when that one
is killed (`_guardian.py`); (2) every running process has a pid file, written before it is waited for and removed after
its end; (3) `reap` ends what an earlier run left behind and never touches a process it did not start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from research_rl.errors import ServiceError

__all__ = ["Endpoint", "Process", "free_port", "guarded", "reap", "require_free", "spawn", "wait_healthy"]

_GUARDIAN = Path(__file__).with_name("_guardian.py")
_MARKER = "RESEARCH_SERVICE_ID"
_KILL_AFTER_S = 20.0


@dataclass(frozen=True)
class Endpoint:
    """Where a service answers: base address, bearer token, and the served model's name where there is one."""

    url: str
    token: str | None = None
    model: str | None = None


@dataclass
class Process:
    """A started command: `popen` is its guardian, `log` holds its output."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    pid_file: Path

    def poll(self) -> int | None:
        """Return the exit code, None while running."""
        return self.popen.poll()

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.is_file() else ""

    def stop(self) -> int:
        """End the command and all its descendants; return the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            code = self.popen.wait(_KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            end(_identity(self.pid_file))
            code = self.popen.wait()
        if self.popen.stdin:
            self.popen.stdin.close()
        self.pid_file.unlink(missing_ok=True)
        return code


def spawn(
    name: str,
    command: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> Process:
    """Start `command` under a guardian in its own session; its output is appended to `log` (`folder/<name>.log`).

    `env` is added to this process's environment. Raises ServiceError when a process of that name already runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid_file = folder / f"{name}.pid"
    if _alive(_identity(pid_file)):
        raise ServiceError(f"{name} already runs ({pid_file}); stop it with `make down` or use another workspace")
    marker = uuid.uuid4().hex
    log = log or folder / f"{name}.log"
    with log.open("ab") as output:
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARDIAN), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, **(env or {}), _MARKER: marker},
        )
    record = {"pid": popen.pid, "started": psutil.Process(popen.pid).create_time(), "marker": marker, "command": list(command)}
    temporary = pid_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(pid_file)
    return Process(name, popen, log, pid_file)


@contextmanager
def guarded(
    name: str, command: Sequence[str], *, folder: Path, health_url: str, deadline_s: float, env: Mapping[str, str] | None = None
) -> Generator[Process]:
    """Run a service for the length of a block: start, wait until `health_url` answers 200, stop on any exit.

    Raises ServiceError with the last log lines when it ends or stays silent until the deadline.
    """
    process = spawn(name, command, folder=folder, env=env)
    try:
        wait_healthy(process, health_url, deadline_s)
        yield process
    finally:
        process.stop()


def wait_healthy(process: Process, health_url: str, deadline_s: float) -> None:
    """Return once `health_url` answers 200. Raises ServiceError."""
    deadline = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(health_url, timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    why = f"is silent after {deadline_s:g} s at {health_url}" if process.poll() is None else f"ended with code {process.poll()}"
    raise ServiceError(f"{process.name} {why}; its log {process.log} ends with:\n{process.tail()}")


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int, setting: str) -> int:
    """Return `port`, or a free one for 0. Raises ServiceError when something listens there already."""
    if port == 0:
        return free_port(host)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"{setting}={port} on {host} cannot be bound ({error.strerror}); set {setting} to a free port or to 0"
            ) from None
    return port


def reap(folder: Path) -> list[str]:
    """End every process named by a pid file in `folder`; return the names of those that still ran."""
    ended: list[str] = []
    for pid_file in sorted(folder.glob("*.pid")):
        identity = _identity(pid_file)
        if end(identity):
            ended.append(pid_file.stem)
        pid_file.unlink(missing_ok=True)
    return ended


@dataclass(frozen=True)
class _Identity:
    pid: int
    started: float
    marker: str


def _identity(pid_file: Path) -> _Identity | None:
    try:
        record = json.loads(pid_file.read_text())
        return _Identity(int(record["pid"]), float(record["started"]), str(record["marker"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _alive(identity: _Identity | None) -> bool:
    if identity is None:
        return False
    try:
        process = psutil.Process(identity.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - identity.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def end(identity: _Identity | None) -> bool:
    """Kill a guardian and all processes that carry its marker or descend from it; return whether any ran."""
    members = _members(identity) if identity else []
    for process in members:
        _send(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(members, timeout=5.0)
    for process in stubborn:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=5.0)
    return bool(members)


def _members(identity: _Identity) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARKER) == identity.marker:
                found[process.pid] = process
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    if _alive(identity):
        guardian = psutil.Process(identity.pid)
        found[guardian.pid] = guardian
        found.update({child.pid: child for child in guardian.children(recursive=True)})
    return list(found.values())


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
