"""Prepare what the checks of `tests/gpu` need on a bare GPU machine without network: wheels, a model, a workspace, as parts to carry.

The machine has Python 3.12 with torch 2.11 and its CUDA libraries; the checkout travels by itself. Run again after an interruption, it
goes on with the payload it was in. There: `python benchmarks/gpu/pack.py PARTS TARGET` for each payload, then the command it prints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import pack
from research_rl.paths import CHECKOUT
from research_rl.pipeline.manifest import MANIFEST
from research_rl.pipeline.stages import Workspace

MIB = 1 << 20
LOCK = CHECKOUT / "requirements/gpu-host.txt"
STAGES = ("download", "validate", "prepare", "corpus", "embed", "index")
LEFT_OUT = (
    "*__pycache__*",
    "*_vllm_fa2_C*",
    "ray/jars",
    "ray/dashboard/client",
    "pyarrow/include",
    "pyarrow/tests",
    "pandas/tests",
    "*libarrow_flight*",
    "*.a",
    "vllm/vllm-rs",
)
"""Parts of the wheels that no check reads: kernels of older cards, Java, web pages, headers, tests, archives, a frontend in Rust."""
NEEDS = {"search": (), "serving": ("site", "model"), "grpo": ("site", "model", "workspace")}
COMMANDS = {
    "search": "python tests/gpu/search.py",
    "serving": "PYTHONPATH=$PWD $HOME/env/bin/python tests/gpu/serving.py --model $HOME/model --python $HOME/env/bin/python",
    "grpo": "PYTHONPATH=$PWD $HOME/env/bin/python tests/gpu/grpo.py --since ${SINCE:-$(date +%s)} --workspace $HOME/workspace "
    "--python $HOME/env/bin/python "
    "policy.source=folder policy.path=$HOME/model",
}
INTERPRETER = (
    "python3 -m venv --without-pip $HOME/env && printf '%s\\n' $HOME/site "
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))') > $HOME/env/lib/python3.12/site-packages/gpu.pth"
)
"""Makes an interpreter that finds the carried wheels first and the machine's own packages after them."""
ENVIRONMENT = "VLLM_USE_FLASHINFER_SAMPLER=0 NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo HF_HUB_OFFLINE=1 TORCH_COMPILE_DISABLE=1"


@dataclass(frozen=True)
class Options:
    """What to prepare, from what, where to."""

    out: Path
    checks: Sequence[str]
    lock: Path
    model: Path | None
    workspace: Path | None
    part_bytes: int


def main(arguments: list[str] | None = None) -> None:
    """Prepare the payloads of the checks, or list them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prepare", description="Pack what the GPU checks must bring along.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts; one inside the checkout should be ignored by git")
    parser.add_argument("--check", nargs="+", choices=sorted(NEEDS), default=sorted(NEEDS), help="checks to prepare (default: all)")
    parser.add_argument("--model", type=Path, help="model folder for serving and grpo")
    parser.add_argument("--workspace", type=Path, help="workspace with the stages up to `index` for grpo")
    parser.add_argument("--wheels", type=Path, default=LOCK, help="locked requirements (default: requirements/gpu-host.txt)")
    parser.add_argument("--part-mib", type=int, default=55, help="largest part in MiB (default: 55)")
    parser.add_argument("--list", action="store_true", help="say what each check needs, and prepare nothing")
    found = parser.parse_args(arguments)
    options = Options(found.out, found.check, found.wheels, found.model, found.workspace, found.part_mib * MIB)
    missing = [name for name in ("model", "workspace") if name in needed(options) and not getattr(options, name)]
    if found.list:
        print(
            json.dumps(
                {"interpreter": INTERPRETER}
                | {check: {"payloads": NEEDS[check], "command": f"{ENVIRONMENT} {COMMANDS[check]}"} for check in found.check},
                indent=1,
            )
        )
    elif missing:
        wanting = ", ".join(check for check in found.check if missing[0] in NEEDS[check])
        parser.error(f"--{missing[0]} is needed for {wanting}")
    else:
        prepare(options)


def needed(options: Options) -> list[str]:
    """Return the payloads of the chosen checks."""
    return sorted({payload for check in options.checks for payload in NEEDS[check]})


def prepare(options: Options) -> dict[str, dict[str, object]]:
    """Make every payload's parts, leaving those that stand; write and return what there is to carry."""
    found: dict[str, dict[str, object]] = {}
    for payload in needed(options):
        folder, origin = options.out / payload, origin_of(payload, options)
        listing = pack.packed(folder, origin)
        print(f"{payload}: {'stands' if listing else 'packing'}", file=sys.stderr, flush=True)
        if listing is None:
            source = source_of(payload, options)
            listing = pack.pack(source, folder, options.part_bytes, origin, LEFT_OUT if payload == "site" else ())
        sizes = [entry["bytes"] for entry in listing["parts"]]
        found[payload] = {"parts": len(sizes), "bytes": sum(sizes), "for": [check for check in options.checks if payload in NEEDS[check]]}
    (options.out / "payloads.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))
    return found


def origin_of(payload: str, options: Options) -> str:
    """Return a hash of what a payload is made from; other origin or other part size, other parts."""
    digest = hashlib.sha256(f"{payload} {options.part_bytes} {LEFT_OUT}".encode())
    if payload == "site":
        digest.update(options.lock.read_bytes())
    elif payload == "model":
        for path in _files(options.model):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    else:
        for stage in STAGES:
            digest.update((_workspace(options).folder(stage) / MANIFEST).read_bytes())
    return digest.hexdigest()


def source_of(payload: str, options: Options) -> Path:
    """Return the folder to pack, made first where it has to be."""
    if payload == "site":
        return wheels(options.out / "wheels", options.lock)
    if payload == "model":
        assert options.model
        return options.model
    return knowledge(options.out / "knowledge", _workspace(options))


def wheels(site: Path, lock: Path) -> Path:
    """Install the locked wheels for the GPU machine's Python beside each other, without what they depend on."""
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", str(site), "-r", str(lock)]
    subprocess.run([*command, "--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34"], check=True)
    return site


def knowledge(target: Path, workspace: Workspace) -> Path:
    """Copy params.yaml and the stages that training reads."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(workspace.root / "params.yaml", target)
    for stage in STAGES:
        folder = workspace.folder(stage)
        shutil.copytree(folder, target / folder.relative_to(workspace.root))
    return target


def _workspace(options: Options) -> Workspace:
    assert options.workspace
    return Workspace(options.workspace.resolve())


def _files(folder: Path | None) -> list[Path]:
    assert folder
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
