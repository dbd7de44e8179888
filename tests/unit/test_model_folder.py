"""One rule for model folders: what is incomplete is refused in the stage `policy`, and what is published is a copy of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research_rl import config
from research_rl.errors import ConfigError, ModelError
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Workspace
from research_rl.serving.model import inspect, stated_rows
from research_rl.serving.tensors import Output, content, tensors, weight_bytes, write
from tests.contract import chain_model

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 2770000\n"
Spoil = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return chain_model.build(tmp_path / "model", {"tick": "tock", "tock": "tick"})


def publish(root: Path, model: Path, *overrides: str) -> Path:
    """Build the stage `policy` from a folder; return the artifact."""
    space = Workspace(root / "workspace")
    resolved = config.load_profile("laptop", ["policy.source=folder", f"policy.path={model}", "policy.warm_up=false", *overrides])
    run_stage("policy", resolved, space)
    return space.folder("policy")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, files: dict[str, Callable[[str], bool]]) -> None:
    """Write the tensors of a model again, each file those whose names it takes."""
    present = tensors(folder)
    data = {name: content(tensor).tobytes() for name, tensor in present.items()}
    (folder / "model.safetensors").unlink()
    for file, takes in files.items():
        chosen = [tensor for name, tensor in present.items() if takes(name)]
        write(folder / file, [Output(t.name, t.dtype, t.shape, len(data[t.name]), lambda t=t: iter([data[t.name]])) for t in chosen])


def in_shards(folder: Path, *, index: bool) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    rewrite(folder, {first: lambda name: "layers" in name, second: lambda name: "layers" not in name})
    if index:
        places = {name: tensor.file.name for name, tensor in tensors(folder).items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def lost_shard(folder: Path, *, index: bool) -> None:
    in_shards(folder, index=index)
    (folder / "model-00002-of-00002.safetensors").unlink()


def stale_index(folder: Path) -> None:
    in_shards(folder, index=True)
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**places, "model.extra.weight": "model-00001-of-00002.safetensors"}}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FAULTS: dict[str, tuple[Spoil, str]] = {
    "no configuration": (lambda m: (m / "config.json").unlink(), r"has no config\.json"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "no tokenizer settings": (lambda m: (m / "tokenizer_config.json").unlink(), r"has no tokenizer_config\.json"),
    "configuration is no JSON": (lambda m: (m / "config.json").write_text("{"), r"config\.json is not JSON"),
    "configuration is a list": (lambda m: (m / "config.json").write_text("[]"), "holds a list, not an object"),
    "no architecture": (lambda m: edit(m / "config.json", architectures=None), "names no architectures"),
    "tokenizer is a pointer": (lambda m: (m / "tokenizer.json").write_bytes(LFS_POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "weights are a pointer": (lambda m: (m / "model.safetensors").write_bytes(LFS_POINTER), r"model\.safetensors is a Git LFS pointer"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"has no \*\.safetensors"),
    "pickled weights": (pickled_only, r"has no \*\.safetensors"),
    "weights cut in the data": (lambda m: cut(m / "model.safetensors", 9000), r"has 9000 bytes, its header says \d+"),
    "weights cut in the header": (lambda m: cut(m / "model.safetensors", 100), "is cut in its header"),
    "empty weights": (lambda m: cut(m / "model.safetensors", 0), "is cut in its header"),
    "a shard of the index is lost": (lambda m: lost_shard(m, index=True), r"lacks 1 of 2 weight files, model-00002-of-00002"),
    "a numbered shard is lost": (lambda m: lost_shard(m, index=False), r"lacks 1 of 2 weight files, model-00002-of-00002"),
    "the index lists more": (stale_index, r"lists 16 tensors, 1 are not where it says, 'model\.extra\.weight'"),
    "a layer is lost": (lambda m: edit(m / "config.json", num_hidden_layers=3), "weights for 1 of 3 layers, layer 1 has none"),
    "no output weights": (lambda m: rewrite(m, {"model.safetensors": lambda name: "lm_head" not in name}), "has no output weights"),
    "another tokenizer": (lambda m: edit(m / "config.json", vocab_size=10), r"the tokenizer has \d+ tokens, the model only 10 rows"),
    "an end of turn the tokenizer does not know": (lambda m: edit(m / "tokenizer_config.json", eos_token="<x>"), "eos_token='<x>'"),
    "padding the tokenizer does not know": (lambda m: edit(m / "tokenizer_config.json", pad_token="<x>"), "pad_token='<x>'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_model_is_refused_before_anything_is_published(fault: str, model: Path, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(model)
    with pytest.raises(ModelError, match=message):
        publish(tmp_path, model)
    assert not (tmp_path / "workspace" / "artifacts" / "policy").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent is not a folder"):
        publish(tmp_path, tmp_path / "absent")


def test_the_rows_are_those_of_the_embeddings_where_the_configuration_does_not_say_them(model: Path) -> None:
    """Gemma 3's config.json leaves them to its architecture: the model was refused as one of 0 rows."""
    stated = inspect(model).rows
    config = json.loads((model / "config.json").read_text())
    del config["vocab_size"]
    (model / "config.json").write_text(json.dumps(config))
    assert inspect(model).rows == stated_rows(model) == stated


@pytest.mark.parametrize("index", [True, False])
def test_a_model_in_several_files_is_whole(index: bool, model: Path) -> None:
    whole = inspect(model)
    in_shards(model, index=index)
    assert inspect(model).vocabulary == whole.vocabulary
    assert weight_bytes(model) == inspect(model).weight_bytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_files_that_the_index_does_not_list_are_no_weights(model: Path, tmp_path: Path) -> None:
    in_shards(model, index=True)
    size = weight_bytes(model)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "consolidated.safetensors")
    (model / "training_args.bin").write_bytes(b"pickled")
    assert weight_bytes(model) == size
    names = {path.name for path in publish(tmp_path, model).iterdir()}
    assert not {"consolidated.safetensors", "training_args.bin"} & names
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"} <= names


def test_a_published_model_and_the_users_own_do_not_alter_each_other(model: Path, tmp_path: Path) -> None:
    policy = publish(tmp_path, model)
    before = {path.name: path.read_bytes() for path in policy.iterdir()}
    assert {path.name: path.read_bytes() for path in model.iterdir()}.items() <= before.items()
    for path in policy.iterdir():
        path.chmod(0o444)  # as DVC does with the files it has linked
    for path in model.iterdir():
        assert path.stat().st_mode & 0o200, f"{path.name} of the user's folder became read-only"
        with path.open("r+b") as stream:
            stream.write(b"edited")
    assert {path.name: path.read_bytes() for path in policy.iterdir()} == before


def test_a_model_without_padding_is_published_and_its_stand_in_recorded(model: Path, tmp_path: Path) -> None:
    facts = manifest_facts(publish(tmp_path, model))
    assert (facts["architecture"], facts["pad_token"]) == ("Qwen2ForCausalLM", chain_model.EOS)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ConfigError, "needs a model with a chat template"),
        ("{{ raise_exception('closed') }}", ModelError, "TemplateError: closed"),
    ],
)
def test_a_chat_template_that_makes_no_prompt_is_refused(
    template: str | None, error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    edit(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(error, match=message):
        publish(tmp_path, model, "prompt.template=instruct")
    assert publish(tmp_path, model).is_dir(), "other prompts do not need it"


def test_where_the_instructions_stand_is_recorded(model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert manifest_facts(publish(tmp_path, model, "prompt.template=instruct"))["instructions_in"] == "user's turn"


def manifest_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["facts"]
