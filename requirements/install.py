"""Create the environments from the locks. Standard library only; does nothing when an environment fits its lock.

Usage: python3.11 requirements/install.py pipeline policy serve

Indexes, certificates and trusted hosts are pip's own settings, from its files and variables; uv is told of them.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "pipeline": ROOT / ".venv",
    "policy": ROOT / ".venv-policy",
    "serve": ROOT / ".venv-serve",
    # Of the images alone: what the retriever imports, without and with the encoders that need torch.
    "retriever": ROOT / ".venv-retriever",
    "retriever-torch": ROOT / ".venv-retriever",
}
WITHOUT_TORCH = {"retriever"}
PLUGIN = ROOT / "requirements" / "sglang_cpu"
"""What SGLang needs on a CPU, a distribution of its own."""
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
UV = "uv==0.13.9"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NUMA = "libnuma.so.1"
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
"""pip's settings that uv does not read by itself, and the variables by which it takes them."""


def main(names: list[str]) -> None:
    """Install each named environment."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"set-up: Python {sys.version.split()[0]} runs this, the locks are for 3.11; call it with python3.11")
    for name in names:
        if name not in FOLDERS:
            sys.exit(f"set-up: {name!r} is not one of {list(FOLDERS)}")
    if "policy" in names:
        require_numa()
    for name in names:
        install(name)


def require_numa() -> None:
    """End with one line where the library is missing that vLLM loads, before an hour of training finds it out."""
    try:
        ctypes.CDLL(NUMA)
    except OSError:
        sys.exit(
            f"set-up: {NUMA} is missing, which vLLM loads; install it (Debian, Ubuntu: libnuma1; Fedora: numactl-libs) and start again"
        )


def install(name: str) -> None:
    """Bring one environment in line with its lock."""
    folder, lock = FOLDERS[name], ROOT / "requirements" / f"{name}.txt"
    sources = [lock, Path(__file__), *(sorted(PLUGIN.rglob("*.py")) if name == "serve" else [])]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + str(folder).encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    print(f"set-up: installing {folder.name} from {lock.relative_to(ROOT)}", flush=True)
    python = from_lock(folder, lock)
    if name not in WITHOUT_TORCH:
        install_torch(python)
    # By the setuptools that the lock names.
    own = [python, *PIP, "--no-deps", "--no-build-isolation"]
    if name == "pipeline":
        run(*own, "-e", ROOT)
    if name == "serve":
        with tempfile.TemporaryDirectory() as copy:
            # pip builds beside the sources.
            run(*own, shutil.copytree(PLUGIN, Path(copy) / PLUGIN.name))
        packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (packages / "research_sglang_cpu.pth").write_text("import research_sglang_cpu.vision\n")
    stamp.write_text(digest)
    print(f"set-up: {folder.name} ready in {time.monotonic() - started:.0f} s", flush=True)


def from_lock(folder: Path, lock: Path) -> Path:
    """Install what a lock names into an environment, which is made where there is none; return its interpreter."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    run(python, *PIP, UV)
    run(python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--no-deps", "-r", lock, env=uv_environment(python))
    return python


def install_torch(python: Path) -> None:
    """Install torch's CPU build: from the configured indexes, else from PyTorch's own."""
    pip = [str(python), *PIP, "--no-deps"]
    if subprocess.run([*pip, TORCH], stderr=subprocess.DEVNULL).returncode == 0:
        return
    print(f"set-up: {TORCH} is not in the configured indexes; trying {TORCH_INDEX}", flush=True)
    run(*pip, "--index-url", TORCH_INDEX, TORCH)


def uv_environment(python: Path) -> dict[str, str]:
    """Return this environment with pip's indexes and certificates for uv; a variable of uv's own that is set wins."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    told = {UV_VARIABLES[name]: value for name, value in pip_settings(listed).items() if name in UV_VARIABLES}
    if "UV_INDEX" in told:
        # As pip does: of all indexes the pinned version is taken, wherever it is. Without this uv looks into the first that has the name.
        told["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if system_certificates():
        told["UV_SYSTEM_CERTS"] = "true"
    return {**told, **os.environ}


def pip_settings(listed: str) -> dict[str, str]:
    """Return what `pip config list` says holds for `pip install`: variables before its own section before the global one."""
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    for section in ("global", "install", ":env:"):
        for name, _, value in lines:
            place, _, key = name.rpartition(".")
            if place == section:
                # A setting over several lines lists several values.
                settings[key] = " ".join(str(ast.literal_eval(value)).split())
    return settings


def system_certificates() -> bool:
    """Whether this machine has certificates of its own; a minimal image has none, and uv's built-in ones serve there."""
    paths = ssl.get_default_verify_paths()
    folder = Path(paths.capath) if paths.capath else None
    return paths.cafile is not None or (folder is not None and any(folder.iterdir()))


def run(*command: object, env: dict[str, str] | None = None) -> None:
    """Run a command or end with its exit code."""
    code = subprocess.run([str(part) for part in command], env=env).returncode
    if code:
        sys.exit(f"set-up: `{' '.join(map(str, command))}` failed with code {code}")


if __name__ == "__main__":
    main(sys.argv[1:])
