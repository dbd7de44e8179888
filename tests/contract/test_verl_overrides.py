"""verl's own schema accepts what is rendered for every shipped profile and engine, and understands it as meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config, load_profile, profiles
from research_rl.errors import TrainingError
from research_rl.paths import CHECKOUT
from research_rl.planning import paper
from research_rl.planning.dry_run import compose
from research_rl.training.run.overrides import Paths, render

GPU_PROFILES = [name for name in profiles() if load_profile(name).train.hardware == "gpu"]
CASES: dict[str, tuple[str, list[str]]] = {
    **{f"{name}/{engine}": (name, [f"train.engine={engine}"]) for name in GPU_PROFILES for engine in ("vllm", "sglang")},
    **{name: (name, []) for name in profiles() if name not in GPU_PROFILES},
    "smollm/gpu": ("smollm", ["train.hardware=gpu"]),
    "idle": ("paper-7b-node", ["trainer.offload=idle"]),
    "adapter": ("paper-7b-node", ["train.lora_rank=16", "train.lora_alpha=64", "train.lora_targets=[q_proj, v_proj]"]),
    "filter": ("laptop", ["train.filter_groups.enabled=true", "train.filter_groups.metric=f1", "train.filter_groups.batches_in_flight=2"]),
    "tis": ("laptop", ["train.rollout_correction.method=tis"]),
    "icepop": ("paper-7b", ["train.rollout_correction={method: icepop, level: sequence, normalise: true}"]),
    "dr_grpo": ("laptop", ["train.advantage=dr_grpo", "train.loss_mean=seq-mean-token-sum-norm", "train.clip_ratio_high=0.28"]),
    **{loss: ("laptop", [f"train.loss={loss}"]) for loss in ("gspo", "cispo", "sapo", "geo_mean")},
    **{advantage: ("laptop", [f"train.advantage={advantage}"]) for advantage in ("rloo", "opo")},
    "cluster": ("laptop", ["cluster.launcher=ray-job", "trainer.validate_every=5"]),
}


ODD = ("é研究 b", "()[]{}", ",=#'&!;~", '"%20?\\')
"""Names of folders that Hydra, a shell or a URL would read as something else."""


def paths(model: str = "/models/it's here", root: str = "/w") -> Paths:
    return Paths(Path(model), Path("/d/train.parquet"), Path("/d/dev.parquet"), Path(root), Path("/tmp/r"))


def config(name: str) -> Config:
    profile, chosen = CASES[name]
    return load_profile(profile, chosen)


@pytest.fixture(scope="module")
def understood() -> dict[str, Any]:
    odd = {f"odd {name}": render(load_profile("laptop"), paths(f"/m/{name}/it", f"/w/{name}/it")) for name in ODD}
    return compose(Config(), {**{name: render(config(name), paths()) for name in CASES}, **odd})


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(name: str, understood: dict[str, Any]) -> None:
    """Hydra takes every path as it is, its own run folder's included, which stands among the overrides."""
    found = understood[f"odd {name}"]
    assert found["trainer"]["default_local_dir"] == f"/w/{name}/it/checkpoints"
    assert found["actor_rollout_ref"]["model"]["path"] == f"/m/{name}/it"
    assert [word for word in render(load_profile("laptop"), paths(root=f"/w/{name}/it")) if word.startswith("hydra.run.dir=")]


def test_dynamic_sampling_reaches_verl_and_our_replay_buffer(understood: dict[str, Any]) -> None:
    assert understood["filter"]["algorithm"]["filter_groups"]["enable"], "verl fetches questions one by one"
    told = understood["filter"]["trainer"]["v1"]["sampler"]["sampler_kwargs"]
    assert told == {"filter_groups_metric": "f1", "max_inflight_gen_batches": 2, "train_batch_size": 16, "max_batches": 10}
    assert understood["laptop"]["trainer"]["v1"]["sampler"]["sampler_kwargs"] == {}


@pytest.mark.parametrize(("name", "level", "threshold", "mean"), [("tis", "token", "2", False), ("icepop", "sequence", "0.5_5", True)])
def test_rollout_correction_reaches_verl(name: str, level: str, threshold: str, mean: bool, understood: dict[str, Any]) -> None:
    found = understood[name]["algorithm"]["rollout_correction"]
    assert (found["rollout_is"], found["rollout_is_threshold"], found["rollout_is_batch_normalize"]) == (level, threshold, mean)
    assert found["bypass_mode"] is False


def test_losses_and_advantages_reach_verl(understood: dict[str, Any]) -> None:
    actors = {name: understood[name]["actor_rollout_ref"]["actor"] for name in CASES}
    for loss in ("gspo", "cispo", "sapo", "geo_mean"):
        assert actors[loss]["policy_loss"]["loss_mode"] == loss
    for name in ("rloo", "opo"):
        assert understood[name]["algorithm"]["adv_estimator"] == name
    dr_grpo, algorithm = actors["dr_grpo"], understood["dr_grpo"]["algorithm"]
    assert (algorithm["adv_estimator"], algorithm["norm_adv_by_std_in_grpo"]) == ("grpo", False)
    assert (dr_grpo["loss_agg_mode"], dr_grpo["loss_scale_factor"]) == (
        "seq-mean-token-sum-norm",
        config("dr_grpo").episode.max_response_tokens,
    )
    assert (dr_grpo["clip_ratio_low"], dr_grpo["clip_ratio_high"]) == (0.2, 0.28)


def test_every_profile_composes_in_struct_mode_and_validates(understood: dict[str, Any]) -> None:
    assert len(GPU_PROFILES) == 8
    for name in CASES:
        found = understood[name]
        train, trainer, policy = config(name).train, config(name).trainer, found["actor_rollout_ref"]
        assert policy["actor"]["fsdp_config"]["strategy"] == policy["ref"]["fsdp_config"]["strategy"] == "fsdp2", name
        assert policy["model"]["path"] == "/models/it's here"
        assert policy["rollout"]["name"] == train.engine
        assert found["trainer"]["device"] == {"cpu": "cpu", "gpu": "cuda"}[train.hardware]
        assert (found["trainer"]["nnodes"], found["trainer"]["n_gpus_per_node"]) == (trainer.nodes, trainer.gpus_per_node)
        assert policy["actor"]["use_kl_loss"] is (train.kl_coef > 0)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", GPU_PROFILES)
def test_a_paper_profile_differs_from_the_paper_only_with_a_reason(name: str, engine: str, understood: dict[str, Any]) -> None:
    compared = paper.compare(config(f"{name}/{engine}"), understood[f"{name}/{engine}"])
    assert [(item.parameter.name, item.value) for item in compared if item.unexplained] == []
    packed = understood[f"{name}/{engine}"]["actor_rollout_ref"]
    assert packed["model"]["override_config"] == {"attn_implementation": "flash_attention_2"}
    assert packed["model"]["use_remove_padding"] and packed["actor"]["use_dynamic_bsz"] and packed["rollout"]["log_prob_use_dynamic_bsz"]


def test_a_changed_hyperparameter_is_noticed(understood: dict[str, Any]) -> None:
    changed = load_profile("paper-7b", ["episode.top_k=3"])
    compared = paper.compare(changed, understood["paper-7b/vllm"])
    assert [item.parameter.name for item in compared if item.unexplained] == ["passages a search"]


def test_the_document_shows_the_table_of_the_profile(understood: dict[str, Any]) -> None:
    table = paper.table(paper.compare(config("paper-7b/vllm"), understood["paper-7b/vllm"]))
    document = (CHECKOUT / "docs/paper_index.md").read_text()
    assert table in document, "docs/paper_index.md is not what the profile gives; put this table into it:\n" + table


def test_the_differing_profiles_differ_where_the_document_says(understood: dict[str, Any]) -> None:
    def values(name: str) -> dict[str, Any]:
        return {item.parameter.name: item.value for item in paper.compare(config(name), understood[name])}

    first = values("paper-7b/vllm")
    differing = {name: {key for key, value in values(f"{name}/vllm").items() if value != first[key]} for name in GPU_PROFILES}
    node, large, host = {"machines"}, {"GPUs an engine", "GPUs a server"}, {"training state lives in host memory"}
    assert differing == {
        "paper-7b": set(),
        "paper-7b-base": set(),
        "paper-7b-node": node,
        "paper-7b-base-node": node,
        "paper-32b": large,
        "paper-32b-base": large,
        "paper-32b-node": node | large | host,
        "paper-32b-base-node": node | large | host,
    }


def test_offload_and_adapter_reach_verl(understood: dict[str, Any]) -> None:
    fsdp = understood["idle"]["actor_rollout_ref"]["actor"]["fsdp_config"]
    assert (fsdp["param_offload"], fsdp["optimizer_offload"], fsdp["offload_policy"]) == (True, True, False)
    model = understood["adapter"]["actor_rollout_ref"]["model"]
    assert (model["lora_rank"], model["lora_alpha"], model["target_modules"]) == (16, 64, ["q_proj", "v_proj"])
    assert model["lora"]["merge"] is True


def test_a_cluster_that_stands_is_not_told_its_size(understood: dict[str, Any]) -> None:
    assert understood["cluster"]["ray_kwargs"]["ray_init"] == {"num_cpus": None, "runtime_env": {"py_executable": None}}
    assert understood["laptop"]["ray_kwargs"]["ray_init"]["num_gpus"] == 1


def test_an_unknown_extra_is_refused_by_verl() -> None:
    typo = load_profile("laptop", ["train.extra={trainer.no_such_option: 1}"])
    with pytest.raises(TrainingError, match="no_such_option"):
        compose(Config(), {"typo": render(typo, paths())})
