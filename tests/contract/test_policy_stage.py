"""The stage `policy` with the policy environment's real Trainer: what it publishes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_rl.config import Config, load_profile
from research_rl.episode.prompts import FolderTokenizer
from research_rl.errors import ModelError, TrainingError
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest, run
from research_rl.pipeline.stages import Workspace

SMALL = ("policy.warmup_drills=2", "policy.warmup_steps=10", "policy.warmup_batch=4", "policy.hidden=32", "policy.layers=1")

pytestmark = pytest.mark.skipif(not (CHECKOUT / ".venv-policy").is_dir(), reason="needs the policy environment; run `make setup`")


def build(root: Path, config: Config) -> tuple[Path, manifest.Manifest, list[str]]:
    workspace, said = Workspace(root), list[str]()
    made, _ = run.run_stage("policy", config, workspace, progress=lambda text, share: said.append(text))
    return workspace.folder("policy"), made, said


def test_a_tiny_policy_is_warmed_up_and_fixed_by_its_seed(tmp_path: Path) -> None:
    folder, made, said = build(tmp_path / "first", load_profile("laptop", SMALL))
    assert made.facts["warmed_up"] is True
    assert made.facts["warmup_steps"] == 12
    assert made.facts["vocabulary"] == len(FolderTokenizer(folder))
    assert made.facts["parameters"] > 0 and made.facts["warmup_tokens"] > 0
    assert any(text.startswith("warm-up step 10/12") for text in said)
    again, _, _ = build(tmp_path / "second", load_profile("laptop", SMALL))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list((tmp_path / "first" / ".services" / "policy").glob("*.pid"))

    taken, facts, _ = build(tmp_path / "third", load_profile("laptop", ("policy.source=folder", f"policy.path={folder}")))
    assert (taken / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert facts.facts["warmed_up"] is False

    base = ("policy.source=folder", f"policy.path={folder}", "policy.warm_up=true")
    warmed, facts, _ = build(tmp_path / "fourth", load_profile("laptop", (*SMALL, *base)))
    assert facts.facts["warmed_up"] is True and facts.facts["vocabulary"] == made.facts["vocabulary"]
    assert facts.facts["warmup_loss"] < made.facts["warmup_loss"]  # it went on from the weights of the first
    assert (warmed / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    assert FolderTokenizer(warmed).eos_token == FolderTokenizer(folder).eos_token


def test_a_failing_warm_up_shows_the_logs_tail_and_publishes_nothing(tmp_path: Path) -> None:
    world = ("policy.warmup_world.entities=4000", "policy.warmup_world.name_words=8")
    with pytest.raises(TrainingError, match=r"research_rl\.training\.policy_env\.warmup ended with code 1(.|\n)*raise name_words"):
        build(tmp_path, load_profile("laptop", (*SMALL, *world)))
    assert not (tmp_path / "artifacts" / "policy").exists()


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ModelError, match=r"policy\.path='a/b': http://127\.0\.0\.1:9 does not give a/b at main .*check name, policy\.revision"
    ):
        build(tmp_path, load_profile("laptop", ("policy.source=hub", "policy.path=a/b")))
