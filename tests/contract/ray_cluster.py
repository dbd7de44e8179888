"""A private Ray cluster on loopback out of the policy environment: a head with its dashboard, and further node processes."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port
from tests.contract.ray_limits import TOO_SLOW, TRIES

BIN = CHECKOUT / ".venv-policy/bin"


@dataclass(frozen=True)
class Cluster:
    """Where the dashboard answers, its token, and the folder every process of the cluster names."""

    address: str
    token: str
    folder: Path

    def processes(self) -> list[str]:
        """Return the command lines of the cluster's workers that run now."""
        found: list[str] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_AUTH_TOKEN") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def busy(self) -> list[str]:
        """Return those that belong to a job: trainers, their workers and engines; a worker of Ray's own pool waits idle for the next."""
        busy = (words for words in self.processes() if not words.startswith("ray::IDLE"))
        return [words for words in busy if "main_ppo" in words or "_leased.py" in words or words.startswith(("ray::", "VLLM"))]


@contextmanager
def cluster(nodes: int) -> Generator[Cluster]:
    """Start a head and `nodes - 1` further node processes, each with 8 CPUs and one logical GPU; end them all."""
    folder = Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    found = Cluster(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32), folder)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": found.token, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    env = {**os.environ, **own, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_enable_worker_prestart": "0"}
    common = ["--num-cpus=8", "--num-gpus=1", f"--object-store-memory={256 * 2**20}", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    # Nothing here uses these; each is a process more that starts within the seconds that Ray grants itself.
    head += ["--no-monitor", "--include-log-monitor=false"]
    try:
        for arguments in [head, *[[f"--address=127.0.0.1:{port}"]] * (nodes - 1)]:
            start([*arguments, *common], env, found)
        with httpx.Client(headers={"Authorization": f"Bearer {found.token}"}, trust_env=False, timeout=30) as client:
            assert client.get(f"{found.address}/api/version").json()["ray_version"] == "2.60.0"
        yield found
    finally:
        end(found)
        shutil.rmtree(folder, ignore_errors=True)


def start(arguments: list[str], env: dict[str, str], found: Cluster) -> None:
    """Start one node process; skip the test when Ray's own limits are too short for this machine every time.

    Ray gives the node 30 seconds and each of its agents 15, constants of ray 2.60, which a busy machine may need longer for.
    """
    for _ in range(TRIES):
        # The agent, which takes jobs, has a fixed port otherwise: the second Ray of a machine would be without one.
        agent = f"--dashboard-agent-listen-port={free_port()}"
        done = subprocess.run([BIN / "ray", "start", *arguments, agent], env=env, capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert TOO_SLOW in done.stdout + done.stderr, done.stdout + done.stderr
        if "--head" in arguments:
            end(found)
    pytest.skip(f"Ray did not start in {TRIES} tries: {TOO_SLOW}")


def end(found: Cluster) -> None:
    """Kill every process that carries the cluster's token; `ray stop` would take other clusters of the machine along."""
    for _ in range(3):
        members = [process for process in psutil.process_iter() if carries(process, found.token)]
        for process in members:
            process.kill()
        psutil.wait_procs(members, timeout=10)


def carries(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get("RAY_AUTH_TOKEN") == token and process.pid != os.getpid()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
