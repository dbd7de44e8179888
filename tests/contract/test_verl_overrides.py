"""verl's own schema accepts what is rendered for every shipped profile, hardware and engine, and understands it as meant."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import CHECKOUT, Config, load_profile, profiles
from research_rl.training.overrides import Paths, render
from research_rl.training.supervise import interpreter

COMBINATIONS = [("cpu", "vllm"), ("gpu", "vllm"), ("gpu", "sglang")]
PAPER = [
    "train.lr=1e-6",
    "train.prompts=256",
    "train.group=5",
    "train.kl_coef=0.001",
    "train.temperature=1.0",
    "prompt.max_tokens=512",
    "episode.max_response_tokens=8192",
    "train.gradient_checkpointing=true",
    "train.tensor_parallel=2",
    "train.gpus_per_node=8",
    "train.offload=true",
]


def paths(model: str = "/models/it's here") -> Paths:
    return Paths(Path(model), Path("/d/train.parquet"), Path("/d/dev.parquet"), Path("/w"), Path("/tmp/r"))


def compose(cases: dict[str, list[str]], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    command = [str(interpreter(Config())), str(Path(__file__).with_name("verl_compose.py")), str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHECKOUT)})


@pytest.fixture(scope="module")
def understood(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases: dict[str, list[str]] = {}
    for hardware, engine in COMBINATIONS:
        chosen = [f"train.hardware={hardware}", f"train.engine={engine}"]
        for profile in profiles():
            cases[f"{profile}/{hardware}/{engine}"] = render(load_profile(profile, chosen), paths())
        cases[f"paper-like/{hardware}/{engine}"] = render(load_profile("laptop", PAPER + chosen), paths())
    cases["no-kl"] = render(load_profile("laptop", ["train.kl_coef=0", "train.validate_every=5"]), paths())
    done = compose(cases, tmp_path_factory.mktemp("compose"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_profile_composes_in_struct_mode_and_validates(understood: dict[str, Any]) -> None:
    assert len(understood) == len(COMBINATIONS) * (len(profiles()) + 1) + 1
    for name, found in understood.items():
        assert found["strategy"] == ["fsdp2", "fsdp2"] and found["critic"] is False, name
        assert found["model"] == "/models/it's here"
        if "/" in name:
            assert found["engine"] == name.split("/")[2]
            assert found["device"] == {"cpu": "cpu", "gpu": "cuda"}[name.split("/")[1]]


def test_paper_like_values_arrive(understood: dict[str, Any]) -> None:
    found = understood["paper-like/gpu/sglang"]
    assert (found["lr"], found["batch"], found["lengths"], found["reference"]) == (1e-6, [256, 256, 5], [512, 8192], True)


def test_no_kl_needs_no_reference_model(understood: dict[str, Any]) -> None:
    assert understood["no-kl"]["reference"] is False


def test_an_unknown_extra_is_refused_by_verl(tmp_path: Path) -> None:
    config = load_profile("laptop", ["train.extra={trainer.no_such_option: 1}"])
    done = compose({"typo": render(config, paths())}, tmp_path)
    assert done.returncode != 0 and "no_such_option" in done.stderr
