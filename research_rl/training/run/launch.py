"""Start the trainer: as a process of this machine, or as a job of a Ray cluster. Knows no configuration of verl and no step.

Both ways give the same few handles (poll, tail, stop), so that deadlines, resuming and metrics are written once, in `supervise`.
Invariant: what was started ends with this process, however it ends; on a cluster within `cluster.lease_s`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.process import services
from research_rl.process.proxies import httpx_options
from research_rl.process.tokens import checked_token, token_from

__all__ = ["Launcher", "LocalLauncher", "RayJob", "RayJobLauncher", "RayJobs", "Started", "launcher"]

_LEASED = Path(services.__file__).with_name("_leased.py")
_BEAT_S = 1.0
_ASK_S = 1.0
_STOP_S = 60.0
_SUBMIT_S = 120.0
# 143 is what a shell says of a process that SIGTERM ended.
_ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 143}


class Started(Protocol):
    """A started trainer."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        ...

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of its log."""
        ...

    def stop(self) -> int:
        """End it and all it started; return the exit code."""
        ...


class Launcher(Protocol):
    """A way to start the trainer."""

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Started:
        """Start `command` in `cwd` with `env` added; its output goes to `log`."""
        ...

    def reap(self) -> None:
        """End what an earlier process started and left behind."""
        ...


def launcher(config: Config, folder: Path, retriever_url: str) -> Launcher:
    """Return the launcher that `cluster.launcher` names; `folder` keeps its records. Raises ConfigError."""
    if config.cluster.launcher == "local":
        return LocalLauncher(folder)
    _require_reachable(config.cluster.address, retriever_url)
    return RayJobLauncher(RayJobs(config.cluster.address), folder, config.cluster.lease_s)


@dataclass(frozen=True)
class LocalLauncher:
    """The trainer as a guarded process of this machine."""

    folder: Path

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Started:
        """Start it in its own session; see `services.spawn`."""
        return services.spawn("train", command, folder=self.folder, env=env, cwd=cwd, log=log)

    def reap(self) -> None:
        """End the trainer of an earlier process."""
        services.reap(self.folder)


class RayJobs:
    """The job interface of a Ray dashboard. `token` is the cluster's, from RAY_AUTH_TOKEN or the file at RAY_AUTH_TOKEN_PATH."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        token = token or _token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=address, headers=headers, timeout=httpx.Timeout(60.0, connect=5.0), **httpx_options())

    def submit(self, name: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Submit a job under the id `name`; a cluster that has just started may need a while to take it. Raises ServiceError."""
        body = {"submission_id": name, "entrypoint": entrypoint, "runtime_env": {"env_vars": dict(env)}}
        deadline = time.monotonic() + _SUBMIT_S
        while True:
            try:
                self._send("POST", "", body)
                return
            except ServiceError as error:
                # The dashboard answers before the agent that starts jobs has registered.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_ASK_S)

    def info(self, name: str) -> dict[str, Any]:
        """Return the job's record: `status`, `message`, `driver_exit_code` and more. Raises ServiceError."""
        return self._send("GET", name)

    def logs(self, name: str) -> str:
        """Return what the job has printed. Raises ServiceError."""
        return str(self._send("GET", f"{name}/logs")["logs"])

    def stop(self, name: str) -> None:
        """Ask a job to end. Raises ServiceError."""
        self._send("POST", f"{name}/stop")

    def delete(self, name: str) -> None:
        """Forget an ended job. Raises ServiceError."""
        self._send("DELETE", name)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self.client.request(method, f"/api/jobs/{path}", json=body)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"the Ray dashboard cluster.address={self.address} does not answer ({error}); start the cluster, or correct cluster.address"
            ) from error
        if reply.status_code in (401, 403):
            raise ServiceError(
                f"the Ray dashboard {self.address} refuses the token ({reply.status_code}); set RAY_AUTH_TOKEN to the cluster's"
            )
        if reply.is_error:
            raise ServiceError(
                f"the Ray dashboard {self.address} answers {method} {path or 'jobs'} with {reply.status_code}: {reply.text[:500]}"
            )
        return dict(reply.json()) if method != "DELETE" else {}


@dataclass(frozen=True)
class RayJobLauncher:
    """The trainer as a job of a Ray cluster, which ends itself when this process is gone."""

    jobs: RayJobs
    folder: Path
    lease_s: float

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Started:
        """Submit the command; `cwd` and `log` must be on storage the cluster shares. Raises ServiceError."""
        job = RayJob(self.jobs, f"research-{uuid.uuid4().hex[:12]}", log, self._record, log.with_suffix(".lease"), self.lease_s)
        # By the trainer's interpreter, which the nodes have; isolated, since the wrapper needs the standard library alone.
        words = [command[0], "-I", "-S", str(_LEASED), str(job.lease), f"{self.lease_s:g}", str(log), str(cwd), *command]
        job.begin(shlex.join(words), env)
        return job

    def reap(self) -> None:
        """Stop the job of an earlier process, named by its record. Raises ServiceError when the cluster does not answer."""
        if not self._record.is_file():
            return
        name = json.loads(self._record.read_text())["job"]
        RayJob(self.jobs, name, self.folder / "train.log", self._record, self.folder / "none.lease", self.lease_s).stop()

    @property
    def _record(self) -> Path:
        return self.folder / "train.job"


@dataclass
class RayJob:
    """One submitted job. While it runs a thread renews its lease every second."""

    jobs: RayJobs
    name: str
    log: Path
    record: Path
    lease: Path
    lease_s: float
    asked: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    code: int | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def begin(self, entrypoint: str, env: Mapping[str, str]) -> None:
        """Write the record, start the lease, submit. Raises ServiceError."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        # Before the job: a kill in between leaves a record without a job, which `reap` can ask about, and never a job without a record.
        self.record.write_text(json.dumps({"job": self.name, "address": self.jobs.address}))
        self.lease.write_text("0")
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self.jobs.submit(self.name, entrypoint, env)
        except ServiceError:
            self._forget()
            raise

    def poll(self) -> int | None:
        """Return the exit code; 1 when the cluster has been silent for longer than the lease."""
        if self.code is None and time.monotonic() - self.asked >= _ASK_S:
            self.asked = time.monotonic()
            try:
                self._hear(self.jobs.info(self.name))
            except ServiceError as error:
                if time.monotonic() - self.heard > self.lease_s:
                    self._say(str(error))
                    self.code = 1
        return self.code

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log on shared storage."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.is_file() else ""

    def stop(self) -> int:
        """Stop the job, wait until it has ended, and remove its record, which holds its environment. Returns the exit code."""
        deadline = time.monotonic() + _STOP_S
        try:
            if self.poll() is None:
                self.jobs.stop(self.name)
            while self.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            self.jobs.delete(self.name)
        except ServiceError as error:
            self._say(f"{error}; the job ends itself after {self.lease_s:g} s")
        self._forget()
        return self.code if self.code is not None else 143

    def _hear(self, info: Mapping[str, Any]) -> None:
        self.heard = time.monotonic()
        if info["status"] not in _ENDED:
            return
        code = info.get("driver_exit_code")
        # A job that never started has failed without a driver's exit code.
        self.code = code if info["status"] == "FAILED" and code else _ENDED[info["status"]]
        # The wrapper itself did not start, so that the cluster alone knows why.
        if self.code and not self.tail(1):
            self._say(f"{info.get('message')}\n{self.jobs.logs(self.name)}")

    def _say(self, text: str) -> None:
        with self.log.open("a") as stream:
            stream.write(f"research: {text}\n")

    def _beat(self) -> None:
        for count in range(1, 2**62):
            if self.over.wait(_BEAT_S):
                return
            # A count, not a time: the clocks of two machines differ.
            self.lease.write_text(str(count))

    def _forget(self) -> None:
        self.over.set()
        self.lease.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def _token() -> str | None:
    """Return the token of the cluster, by Ray's own variables. Raises ConfigError for one that no header can carry."""
    if token := token_from("RAY_AUTH_TOKEN"):
        return token
    if not (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        return None
    try:
        return checked_token(Path(path).read_text(encoding="ascii", errors="surrogateescape"), f"RAY_AUTH_TOKEN_PATH={path}")
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}; name a file with the cluster's token") from None


def _require_reachable(address: str, retriever_url: str) -> None:
    """Raise ConfigError when the cluster is elsewhere and the retriever listens on loopback only."""
    if _is_loopback(retriever_url) and not _is_loopback(address):
        raise ConfigError(
            f"the nodes of cluster.address={address} cannot reach the retriever at {retriever_url}; "
            "set retriever.host to this machine's address, or retriever.url to a service they reach"
        )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
