"""`python -m tasks.local.stack up|down|status|s3`: the servers a workstation needs, on loopback, in the background.

Invariants: (1) `up` twice starts nothing twice; (2) each process has its own group, a pid file and a log below
.services/stack; (3) `down` ends them with all they started and nothing else; (4) a port in use is one clear message.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from research_rl.errors import ResearchError, ServiceError
from research_rl.paths import CHECKOUT, PYTHON
from research_rl.process import proxies, services
from research_rl.process.private import write_private
from research_rl.process.services import free_ports, reap, require_free
from research_rl.terminal import say
from tasks import settings
from tasks.local import apps, sign_in
from tasks.local.deploy import deploy, make_bucket
from tasks.settings import ADDRESSES

__all__ = ["Stack", "main"]

_START_S = 600.0
_GRACE_S = 5.0
_BIN = Path(PYTHON).parent
_SERVERS = ("prefect-server", "mlflow-server", "prefect-worker")


@dataclass(frozen=True)
class LocalService:
    """One background process: its command, its environment, and the address that answers 200 once it is ready (None: at once)."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict[str, str])
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
        """Start what does not run, deploy everything, return the variables of clients. Raises ServiceError."""
        proxies.require_usable()
        running = self.running()
        if running and not (self.folder / settings.KEYS).is_file():
            raise ServiceError(f"{', '.join(sorted(running))} of an earlier release run without a key; run `make down`, then `make up`")
        if running >= set(_SERVERS):
            return self.variables()
        addresses = self._choose()
        env = {**self._environment(), **self.variables()}
        servers = self._prefect(addresses), self._mlflow(addresses)
        # Both are started before either is waited for.
        for service, process in [(service, self._start(service)) for service in servers]:
            services.wait_healthy(process, service.health or "", _START_S)
        deploy(env)
        settings.point_prefect_at(self.state, env)
        worker = (str(_BIN / "prefect"), "worker", "start", "--pool", "laptop", "--type", "process")
        self._start(LocalService("prefect-worker", worker, env))
        return self.variables()

    def down(self) -> list[str]:
        """Stop everything `up` or `s3` started; return the names of what ran."""
        names = reap(self.folder)
        (self.folder / ADDRESSES).unlink(missing_ok=True)
        settings.point_prefect_away(self.state)
        return names

    def running(self) -> set[str]:
        """Return the names of the services that run now."""
        return services.running(self.folder)

    def addresses(self) -> dict[str, str]:
        """Return the addresses of the last `up` by environment variable; empty when nothing was started."""
        return settings.recorded(self.state)

    def variables(self) -> dict[str, str]:
        """Return what a client needs in its environment: the addresses of the last `up`, and the keys."""
        return {**self.addresses(), **settings.keys(self.state)}

    def s3(self) -> dict[str, str]:
        """Start an S3 server for DVC remotes and return the variables its clients need. Raises ServiceError."""
        addresses = self.addresses()
        if "s3" in self.running() and "AWS_ENDPOINT_URL" in addresses:
            return addresses
        ports = [require_free(apps.HOST, int(os.environ.get("RESEARCH_S3_PORT", "8333")), "RESEARCH_S3_PORT")]
        # SeaweedFS derives the ports that are not named from others, which may be in use.
        ports += free_ports(7, apps.HOST)
        addresses |= {
            "AWS_ENDPOINT_URL": f"http://{apps.HOST}:{ports[0]}",
            "AWS_ACCESS_KEY_ID": settings.USER,
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._write(addresses)
        process = self._start(LocalService("s3", s3_command(self.state / ".services" / "s3", ports, addresses)))
        services.wait_healthy(process, addresses["AWS_ENDPOINT_URL"] + "/status", _START_S)
        make_bucket(addresses)
        return addresses

    def _choose(self) -> dict[str, str]:
        """Return the addresses: those in use by running services, else the configured ports, which must be free."""
        running, addresses = self.running(), self.addresses()
        for name, variable, default, service, path in (
            ("PREFECT_API_URL", "RESEARCH_PREFECT_PORT", "4200", "prefect-server", "/api"),
            ("MLFLOW_TRACKING_URI", "RESEARCH_MLFLOW_PORT", "5000", "mlflow-server", ""),
        ):
            if service not in running or name not in addresses:
                port = require_free(apps.HOST, int(os.environ.get(variable, default)), variable)
                addresses[name] = f"http://{apps.HOST}:{port}{path}"
        self._write(addresses)
        return addresses

    def _write(self, addresses: Mapping[str, str]) -> None:
        write_private(self.folder / ADDRESSES, json.dumps(dict(addresses), indent=1))

    def _environment(self) -> dict[str, str]:
        return {
            "PREFECT_HOME": self.home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **settings.PATIENCE,
            **settings.HEARTBEAT,
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "DO_NOT_TRACK": "1",
            "RESEARCH_CHECKOUT": str(CHECKOUT),
            "PYTHONPATH": str(CHECKOUT),
            "PATH": f"{_BIN}:{os.environ.get('PATH', os.defpath)}",
        }

    def _prefect(self, addresses: Mapping[str, str]) -> LocalService:
        url = addresses["PREFECT_API_URL"]
        port = _port(url.removesuffix("/api"))
        env = apps.prefect_environment(port, settings.keys(self.state)["PREFECT_API_AUTH_STRING"])
        return LocalService("prefect-server", apps.command("prefect", port), {**self._environment(), **env}, url + "/health")

    def _mlflow(self, addresses: Mapping[str, str]) -> LocalService:
        uri = addresses["MLFLOW_TRACKING_URI"]
        env = apps.mlflow_environment(_port(uri), self.state, settings.keys(self.state))
        return LocalService("mlflow-server", apps.command("mlflow", _port(uri)), {**self._environment(), **env}, uri + "/health")

    def _start(self, service: LocalService) -> services.Watched:
        """Start a service unless it runs; it outlives this process. Raises ServiceError."""
        if process := services.find(self.folder, service.name):
            return process
        return services.spawn(
            service.name, service.command, folder=self.folder, env=service.env, cwd=CHECKOUT, grace_s=_GRACE_S, detached=True
        )


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def s3_command(folder: Path, ports: Sequence[int], keys: Mapping[str, str]) -> tuple[str, ...]:
    """Return the command of SeaweedFS's S3 server on loopback; `ports`: s3, master, volume, filer, then their gRPC ports in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    access = {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
    config = folder / "s3.json"
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    write_private(config, json.dumps({"identities": [{"name": settings.USER, "credentials": [access], "actions": actions}]}))
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    names += tuple(f"{name}.grpc" for name in names)
    flags = tuple(f"-{name}={port}" for name, port in zip(names, ports, strict=True))
    weed = str(_BIN / "weed")
    return (
        weed,
        "server",
        f"-dir={folder}",
        f"-ip={apps.HOST}",
        f"-ip.bind={apps.HOST}",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *flags,
    )


def _up(stack: Stack) -> None:
    variables = stack.up()
    private = sys.stdout.isatty()
    prefect, mlflow = _pages(variables, private)
    say(f"Prefect  {prefect}\nMLflow   {mlflow}\nlogs     {stack.folder}\nkeys     {stack.folder / settings.KEYS}")
    say(
        "         " + ("these links sign your browser in" if private else "in a terminal, `make up` prints links that sign your browser in")
    )
    say("\nStart a run, in the checkout, with:\n")
    say("  .venv/bin/prefect deployment run research-train/laptop --watch\n")
    if (proxied := sorted(name for name in os.environ if name.lower() in ("http_proxy", "all_proxy"))) and "127.0.0.1" not in _no_proxy():
        say(f"{', '.join(proxied)} is set; `prefect` reaches this server with NO_PROXY=127.0.0.1,localhost in its environment\n")


def _pages(variables: Mapping[str, str], private: bool) -> tuple[str, str]:
    """Return the addresses of both interfaces; `private`: only the user reads them, so that they may sign the browser in."""
    if private:
        return sign_in.links(variables)
    return variables["PREFECT_API_URL"].removesuffix("/api"), variables["MLFLOW_TRACKING_URI"]


def _no_proxy() -> str:
    return os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))


def _down(stack: Stack) -> None:
    say(f"stopped: {', '.join(stack.down()) or 'nothing ran'}")


def _status(stack: Stack) -> None:
    say(f"running: {', '.join(sorted(stack.running())) or 'nothing'}")


def _s3(stack: Stack) -> None:
    say("\n".join(f"export {name}={value}" for name, value in stack.s3().items() if name.startswith("AWS_")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    verbs = {"up": _up, "down": _down, "status": _status, "s3": _s3}
    parser = argparse.ArgumentParser("tasks.local.stack", description="Background services of this checkout, on loopback.")
    parser.add_argument("verb", choices=list(verbs), help="up: Prefect, MLflow, a worker; down: stop all; s3: an S3 server for DVC")
    try:
        verbs[parser.parse_args(arguments).verb](Stack())
    except ResearchError as error:
        say(f"services: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
