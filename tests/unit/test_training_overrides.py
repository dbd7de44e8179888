"""The overrides say what the configuration says; hardware blocks and the user's extras replace, nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from research_rl.config import Config, config_hash
from research_rl.pipeline.stages import STAGES
from research_rl.retriever import TOKEN
from research_rl.training.run import overrides
from research_rl.training.run.overrides import Paths
from research_rl.training.train import work_key
from tests.training import sections

PATHS = Paths(Path("/m"), Path("/d/train.parquet"), Path("/d/dev.parquet"), Path("/w"), Path("/r"))


def config(**values: Any) -> Config:
    return Config.model_validate(sections(**values))


def test_values_reach_verl_under_its_names() -> None:
    found = overrides.resolved(config(prompts_per_step=12, rollouts_per_prompt=5, lr=2e-5, clip_ratio=0.3, temperature=0.7), PATHS)
    assert found["data.train_batch_size"] == found["actor_rollout_ref.actor.ppo_mini_batch_size"] == 12
    assert found["actor_rollout_ref.rollout.n"] == 5
    assert found["actor_rollout_ref.actor.optim.lr"] == 2e-5
    assert {found[f"actor_rollout_ref.actor.clip_ratio{end}"] for end in ("", "_low", "_high")} == {0.3}
    assert found["actor_rollout_ref.rollout.temperature"] == 0.7


ACTOR = "actor_rollout_ref.actor"


def test_the_clip_range_may_differ_on_its_two_sides() -> None:
    found = overrides.resolved(config(clip_ratio=0.2, clip_ratio_high=0.28), PATHS)
    assert [found[f"{ACTOR}.clip_ratio{end}"] for end in ("", "_low", "_high")] == [0.2, 0.2, 0.28]
    assert overrides.resolved(config(clip_ratio_low=0.1), PATHS)[f"{ACTOR}.clip_ratio_low"] == 0.1


@pytest.mark.parametrize(
    ("advantage", "estimator", "divided"), [("grpo", "grpo", True), ("dr_grpo", "grpo", False), ("rloo", "rloo", True)]
)
def test_the_advantage_is_verls_estimator(advantage: str, estimator: str, divided: bool) -> None:
    found = overrides.resolved(config(advantage=advantage), PATHS)
    assert (found["algorithm.adv_estimator"], found["algorithm.norm_adv_by_std_in_grpo"]) == (estimator, divided)


def test_a_sum_over_tokens_is_divided_by_the_longest_response_whatever_the_batch() -> None:
    chosen = Config.model_validate({"train": {"loss_mean": "seq-mean-token-sum-norm"}, "episode": {"max_response_tokens": 700}})
    assert overrides.resolved(chosen, PATHS)[f"{ACTOR}.loss_scale_factor"] == 700
    assert overrides.resolved(config(), PATHS)[f"{ACTOR}.loss_scale_factor"] is None


@pytest.mark.parametrize(
    ("said", "threshold"),
    [
        ({"method": "tis"}, "2"),
        ({"method": "tis", "upper": 3}, "3"),
        ({"method": "icepop"}, "0.5_5"),
        ({"method": "icepop", "lower": 0.2}, "0.2_5"),
    ],
)
def test_rollout_correction_has_verls_bounds_and_makes_it_recompute_log_probabilities(said: dict[str, Any], threshold: str) -> None:
    found = overrides.resolved(config(rollout_correction={"level": "sequence", **said}), PATHS)
    values = [found[f"algorithm.rollout_correction.{name}"] for name in ("bypass_mode", "rollout_is", "rollout_is_threshold")]
    assert values == [False, "sequence", threshold]


def test_any_use_of_rollout_correction_makes_verl_recompute_log_probabilities() -> None:
    """verl corrects nothing in the mode in which the engine's log-probabilities stand for the old policy's."""
    found = overrides.resolved(config(extra={"algorithm.rollout_correction.rollout_rs": "token_k1"}), PATHS)
    assert found["algorithm.rollout_correction.bypass_mode"] is False
    assert overrides.resolved(config(), PATHS)["algorithm.rollout_correction.bypass_mode"] is True


def test_no_kl_leaves_the_reference_model_out() -> None:
    assert overrides.resolved(config(kl_coef=0.0), PATHS)["actor_rollout_ref.actor.use_kl_loss"] is False
    assert overrides.resolved(config(kl_coef=0.001), PATHS)["actor_rollout_ref.actor.use_kl_loss"] is True


def test_hardware_decides_the_platform_and_nothing_of_the_method() -> None:
    cpu, gpu = (overrides.resolved(config(hardware=name), PATHS) for name in ("cpu", "gpu"))
    method = ("algorithm.", "data.train", "data.max", "actor_rollout_ref.actor.optim", "actor_rollout_ref.actor.clip", "trainer.total")
    names = [name for name in cpu if name.startswith(method) and name != "algorithm.rollout_correction.bypass_mode"]
    assert names and all(cpu[name] == gpu[name] for name in names)
    assert not any("research_rl.training.policy_env.cpu" in str(value) for value in gpu.values())
    assert "VERL_USE_EXTERNAL_MODULES" not in overrides.environment(config(hardware="gpu"), PATHS, "0" * 64)


ENGINE = "+actor_rollout_ref.rollout.engine_kwargs.vllm"


def test_an_engine_of_one_worker_on_cpu_keeps_it_in_its_own_process(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in "abcde"))
    one, two = (config(hardware="cpu", tensor_parallel=count) for count in (1, 2))
    found = [overrides.resolved(choice, paths).get(f"{ENGINE}.distributed_executor_backend") for choice in (one, two)]
    told = [overrides.environment(choice, paths, "0" * 64).get("VLLM_ENABLE_V1_MULTIPROCESSING") for choice in (one, two)]
    assert (found, told) == (["uni", None], ["0", None])


def test_a_small_policy_is_decoded_by_one_thread_and_a_large_one_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    paths, weights = Paths(*(tmp_path / name for name in "abcde")), tmp_path / "a" / "model.safetensors"
    weights.parent.mkdir()
    threads: list[str] = []
    for size in (1 << 20, 64 << 20):
        with weights.open("wb") as handle:
            handle.truncate(size)
        threads.append(overrides.environment(config(hardware="cpu"), paths, "0" * 64)["RESEARCH_ENGINE_THREADS"])
    assert threads == ["1", "6"]


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_turns_are_reported_whole_and_sglang_is_told_nothing_of_vllm(hardware: str) -> None:
    chosen = Config.model_validate(
        {"train": {"hardware": hardware}, "prompt": {"max_tokens": 300}, "episode": {"max_response_tokens": 700}},
    )
    assert overrides.resolved(chosen, PATHS)[f"{ENGINE}.stream_interval"] == 1000
    sglang = overrides.resolved(config(hardware="gpu", engine="sglang"), PATHS)
    assert not any(name.startswith(ENGINE) for name in sglang)


def test_extra_is_applied_last_however_it_is_spelled() -> None:
    attention = "actor_rollout_ref.model.override_config.attn_implementation"
    found = overrides.resolved(config(extra={"data.seed": 7, f"++{attention}": "eager"}), PATHS)
    assert found["data.seed"] == 7
    assert [name for name in found if attention in name] == [f"++{attention}"]
    assert list(found)[-2:] == ["data.seed", f"++{attention}"]


def test_resume_is_our_own_choice() -> None:
    assert overrides.resolved(config(), PATHS)["trainer.resume_mode"] == "disable"
    resumed = overrides.resolved(config(), Paths(*(Path(name) for name in "abcde"), resume=Path("/c/global_step_3")))
    assert (resumed["trainer.resume_mode"], resumed["trainer.resume_from_path"]) == ("resume_path", "/c/global_step_3")


def test_checkpoints_are_removed_by_the_supervisor_alone() -> None:
    assert overrides.resolved(config(keep_checkpoints=2), PATHS)["trainer.max_actor_ckpt_to_keep"] is None


def test_agent_file_holds_limits_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "hidden")
    text = overrides.agent_yaml(config(), PATHS, "http://127.0.0.1:1")
    (agent,) = yaml.safe_load(text)
    assert json.loads(agent["settings"])["limits"]["max_searches"] == Config().episode.max_searches
    assert agent["name"] == "search_agent" and "hidden" not in text


def test_the_work_folder_outlives_a_longer_run_but_not_other_parameters() -> None:
    base = work_key(config(steps=10), {})
    assert base == work_key(config(steps=20, save_every=3, step_deadline_s=5.0, max_attempts=9), {})
    assert base != work_key(config(steps=10, lr=1e-3), {})


def test_another_judge_is_another_training_run_and_another_evaluation_but_more_patience_with_it_is_not() -> None:
    def identities(**judge: object) -> list[str]:
        asked = Config.model_validate({"judge": {"url": "http://127.0.0.1:1/v1", **judge}})
        return [work_key(asked, {}), *(config_hash(asked, STAGES[name].sections) for name in ("train", "baseline", "evaluate"))]

    base = identities()
    assert identities(timeout_s=1.0, attempts=9, concurrency=1, proxy="http://127.0.0.1:2") == base
    for other in ({"url": "http://127.0.0.1:3/v1"}, {"max_tokens": 1024}):
        assert not set(identities(**other)) & set(base)
