"""Prompts and the light tokenizer agree with what transformers makes of the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research_rl.config import Config, PromptConfig
from research_rl.episode.prompts import FolderTokenizer, encode_prompt, located, render
from research_rl.errors import ConfigError, ModelError
from research_rl.paths import CHECKOUT

CHAT = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHAT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("question", ["Who?", "What is {x} and {question}?", "Où est «Ça»? {{}}"])
def test_base_prompt_holds_the_question_once_and_ends_where_the_model_goes_on(question: str) -> None:
    text = render(question, PromptConfig(template="base"))
    assert f"User: {question}\nAssistant:" in text and text.endswith("Assistant:")
    assert "\\boxed{}" in text


def test_instruct_prompt_equals_transformers_chat_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = FolderTokenizer(folder)
    config = PromptConfig(template="instruct", max_tokens=4096)
    system = render("", PromptConfig(template="instruct"), "{{ messages[0]['content'] }}")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who wrote it?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    expected = expected["input_ids"] if not isinstance(expected, list) else expected
    assert encode_prompt(ours, "Who wrote it?", config) == expected
    assert ours.eos_id == theirs.eos_token_id and len(ours) == len(theirs)


def test_instruct_needs_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"use base or file"):
        render("Who?", PromptConfig(template="instruct"), None)


def test_a_long_prompt_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens, prompt\.max_tokens is 8"):
        encode_prompt(FolderTokenizer(folder), "Who?", PromptConfig(max_tokens=8))


@pytest.mark.parametrize(("text", "message"), [("no place", "0 times"), ("{question} {question}", "2 times")])
def test_a_template_file_holds_the_question_exactly_once(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        render("Who?", PromptConfig(template="file", path=str(path)))


def test_a_missing_template_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.path=.* does not exist"):
        render("Who?", PromptConfig(template="file", path=str(tmp_path / "none.txt")))


def test_a_template_of_the_workspace_comes_before_the_projects(tmp_path: Path) -> None:
    name = "configs/prompts/laptop.txt"
    config = Config.model_validate({"prompt": {"template": "file", "path": name}})
    assert located(config, tmp_path) == config
    assert render("Who?", located(config, tmp_path).prompt) == (CHECKOUT / name).read_text().rstrip("\n").replace("{question}", "Who?")
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("Mine: {question}")
    assert located(config, tmp_path).prompt.path == str(own)
    assert render("Who?", located(config, tmp_path).prompt) == "Mine: Who?"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        FolderTokenizer(tmp_path)


def test_eos_must_be_in_the_vocabulary(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ModelError, match="'<end>' is not in the vocabulary"):
        FolderTokenizer(folder)
