"""Turn a question into prompt ids. Knows templates and tokenizer folders; knows no model, no verl.

Three templates: `base` is the whole prompt as text (pre-trained models), `instruct` is a system message, the question
being the user's turn of the model's own chat template, `file` is the user's own text with one {question}.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from research_rl.config import PromptConfig
from research_rl.config.template_text import PLACE, template_text
from research_rl.episode.chat import ChatTemplate, read_template, special_tokens
from research_rl.errors import ConfigError, ModelError
from research_rl.pipeline.json_files import read_object

__all__ = ["FolderTokenizer", "encode_prompt", "load_tokenizer", "prompt_text", "render"]

_IN_USE = ("bos_token", "eos_token", "pad_token")
"""Named tokens whose ids the trainer or the prompt needs."""


class FolderTokenizer:
    """The tokenizer of a Hugging Face model folder, read with the `tokenizers` library alone (no torch).

    `eos_id` ends a turn; `pad_token` is None where the folder names none, and verl then pads with `eos_token`. Special tokens are
    never added by `encode` and always shown by `decode`. Raises ModelError for a folder whose tokenizer cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} has no {name}; give a Hugging Face model folder with a fast tokenizer")
        self.folder = folder
        self.settings: dict[str, Any] = _object(folder / "tokenizer_config.json")
        try:
            self._tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception
            raise ModelError(f"{folder / 'tokenizer.json'} is no tokenizer ({error}); download the model again") from None
        # tokenizer.json can carry padding and truncation of its training; a prompt must be neither.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special_tokens = special_tokens(folder, self.settings)
        self._require_known_tokens()
        self.eos_token = self._special_tokens["eos_token"]
        self.eos_id: int = self._tokenizer.token_to_id(self.eos_token)
        self.pad_token = self._special_tokens.get("pad_token")

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own chat template, None where it has none. Raises ModelError when there is no default one."""
        source = read_template(self.folder, self.settings)
        return None if source is None else ChatTemplate(source, self._special_tokens, str(self.folder))

    def encode(self, text: str) -> list[int]:
        """Return ids without special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return text with special tokens shown."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def plain(self, ids: Sequence[int]) -> str:
        """Return text with special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _require_known_tokens(self) -> None:
        """Raise ModelError for a named token that the vocabulary lacks."""
        if "eos_token" not in self._special_tokens:
            raise ModelError(f"{self.folder} names no eos_token, so that no turn would end; name it in tokenizer_config.json")
        for name in _IN_USE:
            token = self._special_tokens.get(name)
            # transformers adds such a token behind the vocabulary, where the embedding has no row for it.
            if token is not None and self._tokenizer.token_to_id(token) is None:
                raise ModelError(f"{self.folder}: {name}={token!r} is not in the vocabulary; repair tokenizer_config.json")


@cache
def load_tokenizer(folder: Path) -> FolderTokenizer:
    """Read the tokenizer of a model folder once. Raises ModelError."""
    return FolderTokenizer(folder)


def render(question: str, config: PromptConfig, chat_template: ChatTemplate | None = None) -> str:
    """Return the prompt text. `chat_template` is the model's, needed by `instruct`. Raises ConfigError or ModelError."""
    text = template_text(config.template, config.path)
    if config.template != "instruct":
        # Not str.format: a template may hold other braces, such as \boxed{}.
        return text.replace(PLACE, question)
    if chat_template is None:
        raise ConfigError("prompt.template='instruct' needs a model with a chat template; use base or file for this model")
    return chat_template.render(text, question)


def prompt_text(tokenizer: FolderTokenizer, question: str, config: PromptConfig) -> str:
    """Return the prompt text for the model of `tokenizer`. Raises ConfigError or ModelError."""
    return render(question, config, tokenizer.chat_template if config.template == "instruct" else None)


def encode_prompt(tokenizer: FolderTokenizer, question: str, config: PromptConfig) -> list[int]:
    """Return prompt ids. Raises ConfigError when they exceed `prompt.max_tokens`, ModelError when the chat template makes none."""
    ids = tokenizer.encode(prompt_text(tokenizer, question, config))
    if len(ids) > config.max_tokens:
        raise ConfigError(f"the prompt of {question[:60]!r} has {len(ids)} tokens, prompt.max_tokens is {config.max_tokens}; raise it")
    return ids


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, ModelError, "download the model again")
