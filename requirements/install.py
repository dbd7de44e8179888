"""Create the environments from the locks. Standard library only; does nothing when an environment fits its lock.

Usage: python3.11 requirements/install.py pipeline policy
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"pipeline": ROOT / ".venv", "policy": ROOT / ".venv-policy"}
UV = "uv==0.13.9"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main(names: list[str]) -> None:
    """Install each named environment."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"set-up: Python {sys.version.split()[0]} runs this, the locks are for 3.11; call it with python3.11")
    for name in names:
        if name not in FOLDERS:
            sys.exit(f"set-up: {name!r} is not one of {list(FOLDERS)}")
        install(name)


def install(name: str) -> None:
    """Bring one environment in line with its lock."""
    folder, lock = FOLDERS[name], ROOT / "requirements" / f"{name}.txt"
    digest = hashlib.sha256(lock.read_bytes() + Path(__file__).read_bytes() + str(folder).encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    print(f"set-up: installing {folder.name} from {lock.relative_to(ROOT)}", flush=True)
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV)
    run(python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--no-deps", "-r", lock)
    install_torch(python)
    if name == "pipeline":
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-e", ROOT)
    stamp.write_text(digest)
    print(f"set-up: {folder.name} ready in {time.monotonic() - started:.0f} s", flush=True)


def install_torch(python: Path) -> None:
    """Install torch's CPU build: from the configured indexes, else from PyTorch's own."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, TORCH], stderr=subprocess.DEVNULL).returncode == 0:
        return
    print(f"set-up: {TORCH} is not in the configured indexes; trying {TORCH_INDEX}", flush=True)
    run(*pip, "--index-url", TORCH_INDEX, TORCH)


def run(*command: object) -> None:
    """Run a command or end with its exit code."""
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        sys.exit(f"set-up: `{' '.join(map(str, command))}` failed with code {code}")


if __name__ == "__main__":
    main(sys.argv[1:])
