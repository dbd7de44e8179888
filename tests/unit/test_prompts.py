"""Prompts and the light tokenizer agree with what transformers makes of the same folder, for the shapes of published chat templates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research_rl import config
from research_rl.agent.ask import ask
from research_rl.config import PromptConfig, located, template_text
from research_rl.episode.chat import ChatTemplate
from research_rl.episode.prompts import FolderTokenizer, encode_prompt, render
from research_rl.errors import ConfigError, ModelError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from research_rl.retriever import command
from research_rl.training.train import work_key

SHAPES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "data" / "chat_templates").glob("*.jinja"))}
WITHOUT_SYSTEM_ROLE = {"gemma2", "mistral_v1", "phi3_no_system"}
MARKS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "<start_of_turn>", "<|eot_id|>", "<｜User｜>", "<think>")
INSTRUCT = PromptConfig(template="instruct", max_tokens=4096)
SYSTEM = template_text.template_text("instruct", None)
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


def write_tokenizer(folder: Path, **settings: Any) -> Path:
    """Write a byte-level tokenizer whose `MARKS` are special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "[INST]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **settings}))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(**settings: Any) -> Path:
        return write_tokenizer(tmp_path, **settings)

    return written


def expected_ids(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    ids: Any = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return ids if isinstance(ids, list) else ids["input_ids"]


def messages(question: str, *, system_role: bool) -> list[dict[str, str]]:
    if system_role:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return [{"role": "user", "content": f"{SYSTEM}\n\n{question}"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_equal_apply_chat_template_token_for_token(shape: str, write: Callable[..., Path]) -> None:
    folder = write(chat_template=SHAPES[shape])
    tokenizer = FolderTokenizer(folder)
    for question in ("Who wrote it?", "  Où est «Ça» {{ x }} </think>? \n", "[INST] \U0001f600 <s>"):
        expected = expected_ids(folder, messages(question, system_role=shape not in WITHOUT_SYSTEM_ROLE))
        assert encode_prompt(tokenizer, question, INSTRUCT) == expected
    assert SYSTEM.strip() in tokenizer.decode(expected_ids(folder, messages("Who?", system_role=shape not in WITHOUT_SYSTEM_ROLE)))


@pytest.mark.parametrize("token", ["<s>", {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True}])
def test_a_template_sees_every_named_token_and_no_other(token: object, write: Callable[..., Path]) -> None:
    template = "{{ bos_token }}|{{ image_token }}|{{ cls_token }}|{{ add_bos_token }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = write(chat_template=template, bos_token=token, cls_token=None, add_bos_token=True)
    prompt = encode_prompt(FolderTokenizer(folder), "Who?", INSTRUCT)
    assert prompt == expected_ids(folder, messages("Who?", system_role=True))
    assert FolderTokenizer(folder).decode(prompt).startswith("<s>|[INST]|||")


def test_tokens_of_the_old_file_are_seen(write: Callable[..., Path]) -> None:
    folder = write(chat_template="{{ bos_token }}" + SHAPES["chatml"], bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<think>", "lstrip": False}, "eos_token": "</s>"}))
    assert encode_prompt(FolderTokenizer(folder), "Who?", INSTRUCT) == expected_ids(folder, messages("Who?", system_role=True))


@pytest.mark.parametrize("text", ['{"bos_token": ', "[]", "\0"])
def test_a_damaged_old_file_is_one_message(text: str, write: Callable[..., Path]) -> None:
    folder = write(chat_template=SHAPES["chatml"])
    (folder / "special_tokens_map.json").write_text(text)
    with pytest.raises(ModelError, match=r"special_tokens_map\.json .*; download the model again"):
        FolderTokenizer(folder)


def test_of_several_templates_the_default_one_is_used(write: Callable[..., Path]) -> None:
    several = [{"name": name, "template": SHAPES[shape]} for name, shape in (("tool_use", "phi3"), ("default", "chatml"))]
    folder = write(chat_template=several)
    prompt = encode_prompt(FolderTokenizer(folder), "Who?", INSTRUCT)
    assert prompt == expected_ids(folder, messages("Who?", system_role=True))
    with pytest.raises(ModelError, match=r"has the chat templates \['tool_use'\] and none named 'default'"):
        encode_prompt(FolderTokenizer(write(chat_template=several[:1])), "Who?", INSTRUCT)


def test_a_template_file_wins_over_the_settings(write: Callable[..., Path]) -> None:
    folder = write(chat_template=SHAPES["phi3"])
    (folder / "chat_template.jinja").write_text(SHAPES["chatml"])
    assert encode_prompt(FolderTokenizer(folder), "Who?", INSTRUCT) == expected_ids(folder, messages("Who?", system_role=True))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('closed') }}", "TemplateError: closed"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ bos_token }} fixed text", "leaves messages out of the prompt"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ messages[0].content * 100000 }}", "characters, 1048576 are allowed"),
        (ENDLESS, "more than 1 s"),
    ],
    ids=["refuses", "syntax", "undefined", "unsafe", "drops messages", "memory", "length", "endless"],
)
def test_a_template_that_makes_no_prompt_is_one_error_in_bounded_time_and_memory(
    template: str, reason: str, write: Callable[..., Path]
) -> None:
    started = time.process_time()
    with pytest.raises(ModelError, match=reason) as raised:
        encode_prompt(FolderTokenizer(write(chat_template=template)), "Who?", INSTRUCT)
    assert "use prompt.template base or file" in str(raised.value)
    assert time.process_time() - started < 5, "the work is not done in this process"


def test_a_template_goes_on_after_a_question_it_could_not_take() -> None:
    loops = "{% if 'loop' in messages[1].content %}" + ENDLESS + "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(loops, {}, "the model")
    assert template.render("do ", "it") == "do it"
    with pytest.raises(ModelError, match="more than 1 s"):
        template.render("do ", "loop")
    assert template.render("do ", "it") == "do it"


@pytest.mark.parametrize("question", ["Who?", "What is {x} and {question}?", "Où est «Ça»? {{}}"])
def test_base_prompt_holds_the_question_once_and_ends_where_the_model_goes_on(question: str) -> None:
    text = render(question, PromptConfig(template="base"))
    assert f"User: {question}\nAssistant:" in text and text.endswith("Assistant:")
    assert "\\boxed{}" in text


def test_instruct_needs_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"use base or file"):
        render("Who?", PromptConfig(template="instruct"), None)


def test_a_long_prompt_is_refused_with_both_numbers(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"tokens, prompt\.max_tokens is 8"):
        encode_prompt(FolderTokenizer(write()), "Who?", PromptConfig(max_tokens=8))


def prompt_file(folder: Path, text: bytes) -> PromptConfig:
    path = folder / "prompt.txt"
    path.write_bytes(text)
    template_text.template_text.cache_clear()
    return PromptConfig(template="file", path=str(path))


@pytest.mark.parametrize("text", ["{question}<|im_start|>assistant\n", "  {question} {{x}} \\boxed{}\r\n\n", "{question}"])
def test_a_template_file_is_taken_as_it_is(text: str, tmp_path: Path) -> None:
    assert render("Who?", prompt_file(tmp_path, text.encode())) == text.replace("{question}", "Who?")


def test_the_laptop_prompt_ends_with_the_question() -> None:
    assert render("Who?", config.load_profile("laptop").prompt) == "Question: Who?"


@pytest.mark.parametrize(
    ("text", "message"), [(b"no place", "0 times"), (b"{question} {question}", "2 times"), (b"{question}\xff", "is not UTF-8")]
)
def test_an_unusable_template_file_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render("Who?", prompt_file(tmp_path, text))


def test_a_missing_template_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.path=.* does not exist"):
        render("Who?", PromptConfig(template="file", path=str(tmp_path / "none.txt")))


def test_a_template_of_the_workspace_comes_before_the_projects(tmp_path: Path) -> None:
    name = "configs/prompts/laptop.txt"
    chosen = config.Config.model_validate({"prompt": {"template": "file", "path": name}})
    assert located(chosen, tmp_path) == chosen
    assert render("Who?", located(chosen, tmp_path).prompt) == (CHECKOUT / name).read_text().rstrip("\n").replace("{question}", "Who?")
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("Mine: {question}")
    assert located(chosen, tmp_path).prompt.path == str(own)
    assert render("Who?", located(chosen, tmp_path).prompt) == "Mine: Who?"


def identities(prompt: PromptConfig) -> list[str]:
    """Return the hash of every stage that reads the prompt, and the name of the training run."""
    resolved = config.load_profile("laptop").model_copy(update={"prompt": prompt})
    return [config.config_hash(resolved, stage.sections) for stage in STAGES.values() if "prompt" in stage.sections] + [
        work_key(resolved, {})
    ]


def test_an_edited_prompt_file_makes_another_artifact_and_another_training_run(tmp_path: Path) -> None:
    before = identities(prompt_file(tmp_path, b"Question: {question}"))
    after = identities(prompt_file(tmp_path, b"Query: {question}"))
    assert len(before) == 5 and not set(before) & set(after)


def test_the_place_of_a_prompt_file_makes_no_difference(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    text = b"Question: {question}"
    assert identities(prompt_file(tmp_path, text)) == identities(prompt_file(tmp_path / "moved", text))
    assert len(identities(PromptConfig(template="file", path=str(tmp_path / "none.txt")))) == 5, "status of a workspace needs no file"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "", "[]", '{"cut": ', "version https://git-lfs.github.com/spec/v1\n"])
def test_an_unusable_tokenizer_file_is_named(name: str, text: str | None, write: Callable[..., Path]) -> None:
    path = write() / name
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(ModelError, match=name):
        FolderTokenizer(path.parent)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
def test_a_token_outside_the_vocabulary_is_refused(name: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=f"{name}='<unknown>' is not in the vocabulary"):
        FolderTokenizer(write(**{name: "<unknown>"}))


def test_a_model_without_an_end_of_turn_is_refused_and_one_without_padding_is_not(write: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="names no eos_token"):
        FolderTokenizer(write(eos_token=None))
    assert FolderTokenizer(write(pad_token=None)).pad_token is None


def test_a_prompt_file_of_the_workspace_is_in_the_hash_of_its_stages(tmp_path: Path) -> None:
    chosen, space = config.load_profile("laptop", ["prompt.path=mine.txt"]), Workspace(tmp_path)
    hashes: set[str] = set()
    for number, text in enumerate(("One {question}", "Two {question}")):
        (tmp_path / "mine.txt").write_text(text)
        template_text.template_text.cache_clear()
        hashes.add(Context(STAGES["policy"], chosen, space, {}, silent).config_hash)
        assert len(hashes) == number + 1


def test_a_question_is_asked_with_the_prompt_file_of_the_workspace(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(command, "running", reached)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mine.txt").write_text("Answer this: {question}")
    chosen = config.load_profile("laptop", ["prompt.path=mine.txt", "prompt.template=file"])
    with pytest.raises(InterruptedError):
        ask(chosen, Workspace(tmp_path / "w"), "Who?", write(), lambda text: None)
