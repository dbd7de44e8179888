"""`python -m tasks.local.stack up|down|status|s3`: the servers a workstation needs, on loopback, in the background.

Invariants: (1) `up` twice starts nothing twice; (2) each process has its own group, a pid file and a log below
.services/stack; (3) `down` ends them with all they started and nothing else; (4) a port in use is one clear message.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from research_rl.errors import ResearchError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process.services import reap, require_free
from tasks.local import settings
from tasks.local.settings import ADDRESSES

__all__ = ["Stack", "main"]

BUCKET = "research-rl"
_HOST = "127.0.0.1"
_START_S = 240.0
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Service:
    """One background process: its command, and the address that answers 200 once it is ready (None: ready when started)."""

    name: str
    command: tuple[str, ...]
    health: str | None = None


class Stack:
    """The background services of this checkout; `state` holds their databases, logs and pid files (the checkout itself).

    Ports come from RESEARCH_PREFECT_PORT, RESEARCH_MLFLOW_PORT and RESEARCH_S3_PORT; 0 takes a free one.
    """

    def __init__(self, state: Path | None = None) -> None:
        self.state = state or CHECKOUT
        self.home = str(state / ".prefect") if state else os.environ.get("PREFECT_HOME", str(CHECKOUT / ".prefect"))
        self.folder = settings.stack_folder(self.state)

    def up(self) -> dict[str, str]:
        """Start what does not run, deploy everything, return the addresses. Raises ServiceError."""
        if self.running() >= {"prefect-server", "mlflow-server", "prefect-worker"}:
            return self.addresses()
        addresses = self._choose()
        env = self._environment(addresses)
        self._start(self._prefect(addresses), env)
        self._start(self._mlflow(addresses), env)
        for name, service in (("prefect-server", self._prefect(addresses)), ("mlflow-server", self._mlflow(addresses))):
            self._wait(name, service.health or "")
        self._deploy(env)
        settings.point_prefect_at(self.state, addresses["PREFECT_API_URL"])
        self._start(Service("prefect-worker", (str(_BIN / "prefect"), "worker", "start", "--pool", "laptop", "--type", "process")), env)
        return addresses

    def down(self) -> list[str]:
        """Stop everything `up` or `s3` started; return the names of what ran."""
        names = reap(self.folder)
        (self.folder / ADDRESSES).unlink(missing_ok=True)
        settings.point_prefect_away(self.state)
        return names

    def running(self) -> set[str]:
        """Return the names of the services that run now."""
        return {path.stem for path in self.folder.glob("*.pid") if _alive(path)}

    def addresses(self) -> dict[str, str]:
        """Return the addresses of the last `up` by environment variable; empty when nothing was started."""
        path = self.folder / ADDRESSES
        return json.loads(path.read_text()) if path.is_file() else {}

    def s3(self) -> dict[str, str]:
        """Start an S3 server for DVC remotes and return the variables its clients need. Raises ServiceError."""
        known = self.addresses()
        if "s3" in self.running() and "AWS_ENDPOINT_URL" in known:
            return known
        ports = [require_free(_HOST, int(os.environ.get("RESEARCH_S3_PORT", "8333")), "RESEARCH_S3_PORT")]
        ports += [require_free(_HOST, 0, "") for _ in range(7)]
        known |= {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{ports[0]}",
            "AWS_ACCESS_KEY_ID": "research",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._write(known)
        self._start(Service("s3", s3_command(self.state / ".services" / "s3", ports, known)), {})
        self._wait("s3", known["AWS_ENDPOINT_URL"] + "/status")
        _make_bucket(known)
        return known

    def _choose(self) -> dict[str, str]:
        """Return the addresses: those in use by running services, else the configured ports, which must be free."""
        running, known = self.running(), self.addresses()
        for name, variable, default, service, path in (
            ("PREFECT_API_URL", "RESEARCH_PREFECT_PORT", "4200", "prefect-server", "/api"),
            ("MLFLOW_TRACKING_URI", "RESEARCH_MLFLOW_PORT", "5000", "mlflow-server", ""),
        ):
            if service not in running or name not in known:
                port = require_free(_HOST, int(os.environ.get(variable, default)), variable)
                known[name] = f"http://{_HOST}:{port}{path}"
        self._write(known)
        return known

    def _write(self, addresses: Mapping[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ADDRESSES
        path.touch(mode=0o600)
        path.write_text(json.dumps(dict(addresses), indent=1))

    def _environment(self, addresses: Mapping[str, str]) -> dict[str, str]:
        return {
            **addresses,
            "PREFECT_HOME": self.home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_API_URL": addresses["PREFECT_API_URL"],
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "RESEARCH_CHECKOUT": str(CHECKOUT),
            "PYTHONPATH": str(CHECKOUT),
            "PATH": f"{_BIN}:{os.environ.get('PATH', os.defpath)}",
        }

    def _prefect(self, addresses: Mapping[str, str]) -> Service:
        url = addresses["PREFECT_API_URL"]
        port = url.removesuffix("/api").rpartition(":")[2]
        return Service("prefect-server", (str(_BIN / "prefect"), "server", "start", "--host", _HOST, "--port", port), url + "/health")

    def _mlflow(self, addresses: Mapping[str, str]) -> Service:
        uri = addresses["MLFLOW_TRACKING_URI"]
        root = self.state
        store = ("--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--default-artifact-root", (root / "mlartifacts").as_uri())
        command = (
            str(_BIN / "mlflow"),
            "server",
            "--host",
            _HOST,
            "--port",
            uri.rpartition(":")[2],
            "--workers",
            "1",
            "--no-serve-artifacts",
        )
        return Service("mlflow-server", (*command, *store), uri + "/health")

    def _start(self, service: Service, env: Mapping[str, str]) -> None:
        """Start a service in its own session unless it runs; it outlives this process."""
        pid_file = self.folder / f"{service.name}.pid"
        if _alive(pid_file):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = uuid.uuid4().hex
        with (self.folder / f"{service.name}.log").open("ab") as log:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=CHECKOUT,
                env={**os.environ, **env, "RESEARCH_SERVICE_ID": marker},
            )
        record = {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "marker": marker, "command": service.command}
        pid_file.write_text(json.dumps(record))

    def _wait(self, name: str, health: str) -> None:
        deadline = time.monotonic() + _START_S
        while _alive(self.folder / f"{name}.pid") and time.monotonic() < deadline:
            try:
                if httpx.get(health, timeout=5.0, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        log = self.folder / f"{name}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        why = "is silent" if _alive(self.folder / f"{name}.pid") else "ended"
        raise ServiceError(f"{name} {why} after at most {_START_S:g} s at {health}; its log {log} ends with:\n{tail}")

    def _deploy(self, env: Mapping[str, str]) -> None:
        """Make the work pools and deploy everything in prefect.yaml. Raises ServiceError."""
        for pool, kind in (("laptop", "process"), ("gpu", "process"), ("multinode", "process")):
            self._run(("work-pool", "create", pool, "--type", kind, "--overwrite"), env)
        self._run(("deploy", "--all", "--prefect-file", "prefect.yaml"), env)

    def _run(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        command = [str(_BIN / "prefect"), "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise ServiceError(
                f"`{' '.join(command[1:])}` ended with code {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}"
            )


def s3_command(folder: Path, ports: Sequence[int], keys: Mapping[str, str]) -> tuple[str, ...]:
    """Return the command of SeaweedFS's S3 server on loopback; `ports`: s3, master, volume, filer, then their gRPC ports in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    access = {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
    config = folder / "s3.json"
    config.touch(mode=0o600)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "research", "credentials": [access], "actions": actions}]}))
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    names += tuple(f"{name}.grpc" for name in names)
    flags = tuple(f"-{name}={port}" for name, port in zip(names, ports, strict=True))
    weed = str(_BIN / "weed")
    return (
        weed,
        "server",
        f"-dir={folder}",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *flags,
    )


def _make_bucket(keys: Mapping[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def _alive(pid_file: Path) -> bool:
    try:
        record = json.loads(pid_file.read_text())
        process = psutil.Process(int(record["pid"]))
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(record["started"])) < 1.0
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return False


def _up(stack: Stack) -> None:
    addresses = stack.up()
    interface = addresses["PREFECT_API_URL"].removesuffix("/api")
    print(f"Prefect  {interface}\nMLflow   {addresses['MLFLOW_TRACKING_URI']}\nlogs     {stack.folder}")
    print("\nStart a run with:\n")
    print(f"  PREFECT_API_URL={addresses['PREFECT_API_URL']} .venv/bin/prefect deployment run research-train/laptop --watch\n")


def _down(stack: Stack) -> None:
    print(f"stopped: {', '.join(stack.down()) or 'nothing ran'}")


def _status(stack: Stack) -> None:
    print(f"running: {', '.join(sorted(stack.running())) or 'nothing'}")


def _s3(stack: Stack) -> None:
    print("\n".join(f"export {name}={value}" for name, value in stack.s3().items() if name.startswith("AWS_")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    verbs = {"up": _up, "down": _down, "status": _status, "s3": _s3}
    parser = argparse.ArgumentParser("tasks.local.stack", description="Background services of this checkout, on loopback.")
    parser.add_argument("verb", choices=list(verbs), help="up: Prefect, MLflow, a worker; down: stop all; s3: an S3 server for DVC")
    try:
        verbs[parser.parse_args(arguments).verb](Stack())
    except ResearchError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
