"""Create the environments of a machine with NVIDIA GPUs from their locks. Standard library only; does nothing where one fits its lock.

Usage: python3.12 requirements/gpu.py [policy] [serve] [index]   (all three when none is named)

ENGINE=vllm or sglang chooses the rollouts of `policy`; FLASH_ATTN_WHEEL names a built wheel of flash-attn, else nvcc compiles it.
What would fail an hour later is asked first: Python, driver, compiler, libraries. Indexes and certificates are pip's settings.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping

from install import PIP, ROOT, from_lock, require_numa, run

DRIVER = (580, 65, 6)
"""The oldest driver that runs CUDA 13.0 on Linux (NVIDIA's release notes of CUDA 13.0, table 3)."""
CUDA = 13
PYTHON = (3, 12)
FLASH = "flash-attn==2.8.3"
FOLDERS = {name: ROOT / f".venv-gpu-{name}" for name in ("policy", "serve", "index")}
ENGINES = ("vllm", "sglang")


def main(names: list[str]) -> None:
    """Check the machine, then install each named environment."""
    if unknown := [name for name in names if name not in FOLDERS]:
        sys.exit(f"setup-gpu: {unknown[0]!r} is not one of {list(FOLDERS)}")
    if (engine := os.environ.get("ENGINE", "vllm")) not in ENGINES:
        sys.exit(f"setup-gpu: ENGINE={engine!r} is not one of {list(ENGINES)}; set one of them")
    wanted = names or list(FOLDERS)
    cards = require_driver(os.environ)
    if sys.version_info[:2] != PYTHON:
        sys.exit(
            f"setup-gpu: Python {sys.version.split()[0]} runs this, the GPU locks are for 3.12; `make setup-gpu GPU_PYTHON=python3.12`"
        )
    if {"policy", "serve"} & set(wanted):
        require_numa()
    if "policy" in wanted:
        require_flash(os.environ)
    print("\n".join(f"setup-gpu: {card}" for card in cards), flush=True)
    for name in wanted:
        install(name, f"gpu-train-{engine}" if name == "policy" else f"gpu-{name}")


def require_driver(env: Mapping[str, str]) -> list[str]:
    """Return a line for each card that NVIDIA's driver names; end with one line where there is none or the driver is too old."""
    tool = shutil.which("nvidia-smi", path=env.get("PATH", os.defpath))
    if tool is None:
        sys.exit(f"setup-gpu: nvidia-smi is not found; install NVIDIA's driver, {_text(DRIVER)} or later, on a machine with a GPU")
    asked = subprocess.run([tool, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"], capture_output=True, text=True)
    if asked.returncode or not asked.stdout.strip():
        said = (asked.stdout + asked.stderr).strip().splitlines() or ["it named no card"]
        sys.exit(
            f"setup-gpu: nvidia-smi fails: {said[0]}; mend the driver (often: start the machine anew after its update) and start again"
        )
    cards = asked.stdout.strip().splitlines()
    if fault := driver_fault(cards[0]):
        sys.exit(f"setup-gpu: {fault}")
    return cards


def driver_fault(card: str) -> str:
    """Return what is wrong with the driver of a line `VERSION, NAME, MEMORY`, or nothing."""
    version = card.partition(",")[0].strip()
    numbers = tuple(int(part) for part in version.split(".")) if re.fullmatch(r"\d+(\.\d+)*", version) else ()
    if numbers >= DRIVER:
        return ""
    return f"driver {version} is older than {_text(DRIVER)}, which CUDA {CUDA} needs; update NVIDIA's driver and start again"


def require_flash(env: Mapping[str, str]) -> None:
    """End with one line where flash-attn could neither be taken as a wheel nor be compiled."""
    if env.get("FLASH_ATTN_WHEEL"):
        return
    nvcc = shutil.which("nvcc", path=env.get("PATH", os.defpath))
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release (\d+)\.", said)
    if found is None or int(found[1]) != CUDA:
        has = f"nvcc is of CUDA {found[1]}" if found else "nvcc is not found"
        wheel = f"name a wheel for torch 2.11 and CUDA {CUDA} as FLASH_ATTN_WHEEL"
        sys.exit(f"setup-gpu: {has}, and flash-attn needs CUDA {CUDA}'s; {wheel}, or put the bin of that toolkit on PATH")


def install(name: str, lock_name: str) -> None:
    """Bring one environment in line with its lock."""
    folder, lock = FOLDERS[name], ROOT / "requirements" / f"{lock_name}.txt"
    flash = (os.environ.get("FLASH_ATTN_WHEEL") or FLASH) if name == "policy" else ""
    digest = hashlib.sha256(lock.read_bytes() + f"{lock_name} {flash} {folder}".encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    print(f"setup-gpu: installing {folder.name} from {lock.relative_to(ROOT)}", flush=True)
    if stamp.is_file():
        # Another engine's packages would stay beside this lock's, and what is half changed fits neither.
        shutil.rmtree(folder)
    python = from_lock(folder, lock)
    if flash:
        # Compiled against the torch that the lock has installed just before.
        run(python, *PIP, "--no-deps", "--no-build-isolation", flash)
    stamp.write_text(digest)
    print(f"setup-gpu: {folder.name} ready in {time.monotonic() - started:.0f} s", flush=True)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(f"{part:02d}" if place else str(part) for place, part in enumerate(version))


if __name__ == "__main__":
    main(sys.argv[1:])
