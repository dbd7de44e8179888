"""Turn a question into prompt ids. Knows templates and tokenizer folders; knows no model, no verl.

Three templates: `base` is the whole prompt as text (pre-trained models), `instruct` is a system message, the question
being the user's turn of the model's own chat template, `file` is the user's own text with one {question}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from research_rl.config import Config, PromptConfig
from research_rl.errors import ConfigError, ModelError
from research_rl.paths import shipped_file

__all__ = ["FolderTokenizer", "encode_prompt", "load_tokenizer", "located", "render"]

_FOLDER = Path(__file__).parent / "templates"


class FolderTokenizer:
    """The tokenizer of a Hugging Face model folder, read with the `tokenizers` library alone (no torch).

    `eos_id` ends a turn. Special tokens are never added by `encode` and always shown by `decode`.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; give a Hugging Face model folder with a fast tokenizer")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.chat_template = _chat_template(folder, self.settings)
        self.eos_token = _token_text(self.settings.get("eos_token"))
        eos_id = self._tokenizer.token_to_id(self.eos_token)
        if eos_id is None:
            raise ModelError(f"{folder}: eos_token={self.eos_token!r} is not in the vocabulary; repair tokenizer_config.json")
        self.eos_id: int = eos_id

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return ids without special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return text with special tokens shown."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


@cache
def load_tokenizer(folder: Path) -> FolderTokenizer:
    """Read the tokenizer of a model folder once. Raises ModelError."""
    return FolderTokenizer(folder)


def located(config: Config, workspace: Path) -> Config:
    """Return `config` with `prompt.path` made absolute where the workspace has that file, so that any process can read it.

    A path that the workspace does not have stays as it is: it names a file of the project, which every machine has in its own folder.
    """
    path = config.prompt.path
    if path is None or not (workspace / path).is_file():
        return config
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"path": str(workspace / path)})})


def render(question: str, config: PromptConfig, chat_template: str | None = None) -> str:
    """Return the prompt text. `chat_template` is the model's Jinja template, needed by `instruct`. Raises ConfigError."""
    template = _template(config.template, config.path)
    if config.template != "instruct":
        return template.replace("{{", "{").replace("}}", "}").replace("{question}", question)
    if chat_template is None:
        raise ConfigError("prompt.template='instruct' needs a model with a chat template; use base or file for this model")
    system = template.replace("{{", "{").replace("}}", "}")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return _chat(chat_template).render(messages=messages, add_generation_prompt=True)


def encode_prompt(tokenizer: FolderTokenizer, question: str, config: PromptConfig) -> list[int]:
    """Return prompt ids. Raises ConfigError when they exceed `prompt.max_tokens`."""
    ids = tokenizer.encode(render(question, config, tokenizer.chat_template))
    if len(ids) > config.max_tokens:
        raise ConfigError(f"the prompt of {question[:60]!r} has {len(ids)} tokens, prompt.max_tokens is {config.max_tokens}; raise it")
    return ids


@cache
def _template(name: str, path: str | None) -> str:
    if name != "file":
        return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    if path is None:
        raise ConfigError("prompt.template='file' needs prompt.path; name a text file with one {question}")
    file = shipped_file(path)
    if not file.is_file():
        raise ConfigError(
            f"prompt.path={path!r} does not exist (looked in the workspace and for {file}); name a text file with one {{question}}"
        )
    text = file.read_text(encoding="utf-8").rstrip("\n")
    if text.count("{question}") != 1:
        raise ConfigError(f"prompt.path={path!r} holds {{question}} {text.count('{question}')} times; exactly one is needed")
    return text


@cache
def _chat(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
