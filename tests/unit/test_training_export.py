"""An exported model has the policy's tensors, shapes and number format, and nothing that is not finite."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from research_rl.errors import ModelError
from research_rl.serving.tensors import floats, tensors
from research_rl.training import export

Values = Mapping[str, np.ndarray]


def write(folder: Path, values: Values, dtype: str = "F32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    data = b""
    for name, array in values.items():
        block = array.astype("<f4").tobytes() if dtype == "F32" else (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(block)]}
        data += block
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3, "tie_word_embeddings": True}))
    vocabulary = {"a": 0, "b": 1, "</s>": 2}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"embed.weight": random.normal(size=(3, 5)).astype("f4"), "norm.weight": np.ones(5, "f4")}


def test_a_whole_model_passes_and_is_counted(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    policy, trained = write(tmp_path / "p", weights), write(tmp_path / "t", {**weights, "lm_head.weight": weights["embed.weight"]})
    assert export.verify(trained, policy) == {"tensors": 3, "parameters": 35}


@pytest.mark.parametrize("damage", ["missing", "foreign", "shape", "nan", "infinite"])
def test_a_damaged_model_is_refused(tmp_path: Path, weights: dict[str, np.ndarray], damage: str) -> None:
    policy, other = write(tmp_path / "p", weights), dict(weights)
    if damage == "missing":
        del other["norm.weight"]
    elif damage == "foreign":
        other["extra.weight"] = np.ones(2, "f4")
    elif damage == "shape":
        other["norm.weight"] = np.ones(4, "f4")
    else:
        other["norm.weight"] = np.array([1, 2, 3, 4, np.nan if damage == "nan" else np.inf], "f4")
    with pytest.raises(ModelError, match=r"norm\.weight|extra\.weight"):
        export.verify(write(tmp_path / "t", other), policy)


def test_weights_take_the_policys_number_format(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    trained = {**weights, "norm.weight": np.array([1.0, 1.00390625, 1.01171875, -3.1415926, 65504.0], "f4")}
    policy, source, target = write(tmp_path / "p", weights, "BF16"), write(tmp_path / "s", trained), tmp_path / "o"
    target.mkdir()
    export.write_like(source, policy, target)
    found = tensors(target)
    assert {tensor.dtype for tensor in found.values()} == {"BF16"}
    norm = found["norm.weight"]
    raw = np.frombuffer((target / "model.safetensors").read_bytes()[norm.start : norm.end], "<u2")
    values = (raw.astype("<u4") << 16).view("<f4")
    assert values.tolist() == [1.0, 1.0, 1.015625, -3.140625, 65536.0]


def test_float32_stays_bit_for_bit(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    policy, source, target = write(tmp_path / "p", weights), write(tmp_path / "s", weights), tmp_path / "o"
    target.mkdir()
    export.write_like(source, policy, target)
    tensor = tensors(target)["embed.weight"]
    assert (target / "model.safetensors").read_bytes()[tensor.start : tensor.end] == weights["embed.weight"].tobytes()


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        tensors(tmp_path)


def adapted(folder: Path, weights: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> Path:
    """Write what verl writes of a policy with an adapter on its projection."""
    names = {"embed.weight": "base_model.model.embed.weight", "proj.weight": "base_model.model.proj.base_layer.weight"}
    factors = {"base_model.model.proj.lora_A.default.weight": a, "base_model.model.proj.lora_B.default.weight": b}
    found = write(folder / "huggingface", {**{names[name]: array for name, array in weights.items()}, **factors})
    (folder / "lora_train_meta.json").write_text(json.dumps({"r": a.shape[0], "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    return found


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_an_adapter_is_merged_into_the_weights_it_was_trained_beside(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(1)
    weights = {"embed.weight": random.normal(size=(3, 5)).astype("f4"), "proj.weight": random.normal(size=(4, 5)).astype("f4")}
    a, b = random.normal(size=(2, 5)).astype("f4"), random.normal(size=(4, 2)).astype("f4")
    policy, trained, target = write(tmp_path / "p", weights, dtype), adapted(tmp_path / "actor", weights, a, b), tmp_path / "out"
    target.mkdir()
    export.write_like(trained, policy, target)
    found = tensors(target)
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(weights, dtype)
    wanted = weights["proj.weight"] + 4 * (b @ a)
    assert np.allclose(floats(found["proj.weight"]), wanted, rtol=1e-6 if dtype == "F32" else 2**-8)
    assert np.allclose(floats(found["embed.weight"]), weights["embed.weight"], rtol=0 if dtype == "F32" else 2**-8)


@pytest.mark.parametrize("damage", ["factor", "meta", "shape"])
def test_an_adapter_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    weights = {"embed.weight": np.ones((3, 5), "f4"), "proj.weight": np.ones((4, 5), "f4")}
    a, b = np.ones((2, 5), "f4"), np.ones((3 if damage == "shape" else 4, 2), "f4")
    trained = adapted(tmp_path / "actor", weights, a, b)
    if damage == "meta":
        (tmp_path / "actor" / "lora_train_meta.json").unlink()
    elif damage == "factor":
        file = trained / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(b"proj.lora_B.default", b"proj.other_.default"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"lora_train_meta\.json|one factor of the adapter of proj\.weight|does not fit"):
        export.write_like(trained, write(tmp_path / "p", weights), tmp_path / "out")
