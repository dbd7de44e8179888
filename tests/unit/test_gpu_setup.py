"""Set-up of a GPU machine says what is missing before it installs anything."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from research_rl.paths import CHECKOUT


@pytest.fixture(name="gpu")
def _gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CHECKOUT / "requirements"))
    return importlib.import_module("gpu")


def programs(folder: Path, **lines: str) -> dict[str, str]:
    """Return an environment whose PATH has programs of these lines alone."""
    for name, line in lines.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return {"PATH": str(folder)}


def test_without_a_driver_it_ends_with_one_line_and_installs_nothing(tmp_path: Path) -> None:
    script = str(CHECKOUT / "requirements/gpu.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    wanted = "setup-gpu: nvidia-smi is not found; install NVIDIA's driver, 580.65.06 or later, on a machine with a GPU\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, wanted, "")


def test_a_driver_that_fails_or_is_old_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    for line, said in (
        ("echo 'NVIDIA-SMI has failed because it couldn'; exit 9", "nvidia-smi fails: NVIDIA-SMI has failed"),
        ("exit 0", "nvidia-smi fails: it named no card"),
        ("echo 570.133.20, NVIDIA H200, 143771 MiB", r"driver 570\.133\.20 is older than 580\.65\.06, which CUDA 13 needs"),
        ("echo 580.65, NVIDIA H200, 143771 MiB", r"driver 580\.65 is older"),
        ("echo '[N/A], NVIDIA H200, 143771 MiB'", r"driver \[N/A\] is older"),
    ):
        with pytest.raises(SystemExit, match=said):
            gpu.require_driver(programs(tmp_path, nvidia_smi=line))
    line = "580.82.07, NVIDIA H200, 143771 MiB"
    assert gpu.require_driver(programs(tmp_path, nvidia_smi=f"echo '{line}'")) == [line]


def test_flash_attention_needs_a_wheel_or_the_compiler_of_its_cuda(gpu: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nvcc is not found, .* as FLASH_ATTN_WHEEL"):
        gpu.require_flash({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match="nvcc is of CUDA 12, and flash-attn needs CUDA 13's"):
        gpu.require_flash(programs(tmp_path, nvcc="echo Cuda compilation tools, release 12.9, V12.9.86"))
    gpu.require_flash(programs(tmp_path, nvcc="echo Cuda compilation tools, release 13.0, V13.0.88"))
    gpu.require_flash({"PATH": "", "FLASH_ATTN_WHEEL": "flash_attn.whl"})


def test_what_it_builds_against_is_what_the_images_build_against(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = (CHECKOUT / "infra/docker/trainer.Dockerfile").read_text()
    assert gpu.FLASH in trainer and f"nvidia/cuda:{gpu.CUDA}." in trainer and f"python{gpu.PYTHON[0]}.{gpu.PYTHON[1]}-venv" in trainer
    for lock in (*(f"gpu-train-{engine}" for engine in gpu.ENGINES), "gpu-serve", "gpu-index"):
        assert (CHECKOUT / f"requirements/{lock}.txt").is_file()
    with pytest.raises(SystemExit, match=r"'trainer' is not one of \['policy', 'serve', 'index'\]"):
        gpu.main(["trainer"])
    monkeypatch.setenv("ENGINE", "tgi")
    with pytest.raises(SystemExit, match=r"ENGINE='tgi' is not one of \['vllm', 'sglang'\]"):
        gpu.main([])
