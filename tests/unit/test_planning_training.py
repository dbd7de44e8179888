"""The plan's formulas give known figures, and what cannot fit is refused with value, limit and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research_rl.config import Config, load_profile, profiles
from research_rl.errors import ConfigError, ModelError
from research_rl.planning.training import GIB, KNOWN, Shape, lines, memory, require_fit, schedule, shape_of

QWEN_7B, QWEN_32B = KNOWN["Qwen/Qwen2.5-7B"], KNOWN["Qwen/Qwen2.5-32B"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int) -> None:
    assert KNOWN[name].parameters == parameters


def test_a_published_shard_of_the_training_state() -> None:
    """ZeRO (arXiv 1910.02054, figure 1): 7.5 B parameters take 120 GB with mixed-precision Adam, 1.9 GB when sharded over 64."""
    one, many = (load_profile("paper-7b", [f"trainer.nodes={nodes}", f"trainer.gpus_per_node={gpus}"]) for nodes, gpus in ((1, 1), (8, 8)))
    scale = 7.5e9 / QWEN_7B.parameters
    assert memory(one, QWEN_7B).state * scale == pytest.approx(120e9)
    assert memory(many, QWEN_7B).state * scale == pytest.approx(1.9e9, rel=0.02)


def test_a_published_size_of_recomputed_activations() -> None:
    """arXiv 2205.05198, table 2: full recomputation keeps 2sbhL bytes; for GPT-3 (h 12288, L 96, s 2048, b 1) 4.8 GB."""
    shape = Shape(12_288, 96, 96, 96, 49_152, 51_200, tied=True, bias=False)
    config = load_profile("paper-7b", ["trainer.max_tokens_per_gpu=2048"])
    inner = 2 * (6 * shape.hidden + 2 * shape.kv_width + 3 * shape.intermediate)
    assert memory(config, shape).activations - 2048 * 2 * inner == pytest.approx(2 * 2048 * 12_288 * 96)


def test_bytes_of_keys_and_values() -> None:
    assert (QWEN_7B.kv_bytes, QWEN_32B.kv_bytes) == (57_344, 262_144)


@pytest.mark.parametrize("name", [name for name in profiles() if name.startswith("paper")])
def test_every_paper_profile_fits_its_machines(name: str, tmp_path: Path) -> None:
    config = load_profile(name)
    assert "GPU-hours" in lines(config, tmp_path)[-1]
    shape = shape_of(config, tmp_path)
    assert shape and require_fit(config, shape).cache > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.nodes=1", "trainer.gpus_per_node=1", "trainer.tensor_parallel=1"],
            r"32\.8 B parameters on 1 x 1 GPUs needs \d+ GiB.*limit is 74 GiB.*add GPUs",
        ),
        (
            ["trainer.nodes=1", "trainer.gpus_per_node=2"],
            r"trainer\.tensor_parallel=4 exceeds trainer\.gpus_per_node=2; lower it or add GPUs",
        ),
        (
            ["trainer.gpu_memory_utilization=0.15"],
            r"engine's weights.*limit is 12 GiB: the engine's share .*=0\.15.*raise trainer\.tensor_parallel",
        ),
        (["trainer.gpu_memory_utilization=0.9"], r"rollouts on 8 x 8 GPUs needs.*lower trainer\.gpu_memory_utilization"),
        (["trainer.nodes=1", "trainer.offload=always", "plan.host_memory_gib=256"], r"host memory needs 610 GiB.*256; add machines"),
    ],
)
def test_what_cannot_fit_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        lines(load_profile("paper-32b", overrides), tmp_path)


def test_an_adapter_makes_room() -> None:
    """32 B weights alone take 131 GB in float32: an adapter fits four GPUs where full training does not fit eight."""
    four = ["trainer.nodes=1", "trainer.gpus_per_node=4", "train.lora_rank=16", "trainer.gpu_memory_utilization=0.5"]
    assert require_fit(load_profile("paper-32b", four), QWEN_32B).state / GIB < 36


def test_measured_rates_replace_assumed_ones() -> None:
    rates = ["plan.train_tokens_per_s=1000", "plan.decode_tokens_per_s=500", "plan.searches=0", "plan.step_overhead_s=0"]
    config = load_profile("paper-7b-node", [*rates, "plan.price_per_gpu_hour=2"])
    found = schedule(config, QWEN_7B)
    assert found.update_s == pytest.approx(1280 * (400 + 512) / 8000)
    assert found.rollout_s == pytest.approx(1280 * 400 / 4000)
    assert found.gpu_hours == pytest.approx(8 * 154 * (found.update_s + found.rollout_s) / 3600)
    assert found.cost == pytest.approx(2 * found.gpu_hours)


def test_the_shape_comes_from_the_policys_folder(tmp_path: Path) -> None:
    tree = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**tree, "vocab_size": 300, "model_type": "qwen2", "tie_word_embeddings": True}))
    assert shape_of(Config(), tmp_path) == Shape(64, 2, 4, 2, 128, 300, tied=True, bias=True)
    assert shape_of(Config(), tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"num_key_value_heads": None}, None),
        ({"vocab_size": "300"}, None),
        ({"hidden_size": 0}, None),
        ({"text_config": {"n_embd": 64, "n_layer": 2}}, None),
        ({"text_config": []}, Shape(64, 2, 4, 4, 128, 300, tied=False, bias=False)),
        ({}, Shape(64, 2, 4, 4, 128, 300, tied=False, bias=False)),
    ],
    ids=str,
)
def test_a_configuration_of_another_kind_is_no_traceback(change: dict[str, object], shape: Shape | None, tmp_path: Path) -> None:
    """Configurations older than grouped queries, of Gemma 3 and of GPT-2 ended `research plan` with a KeyError."""
    tree = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300, **change}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert shape_of(Config(), tmp_path) == shape
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        shape_of(Config(), tmp_path)
