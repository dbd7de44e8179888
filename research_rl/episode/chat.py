"""A model's chat template: which one a folder has, and the prompt it makes. Knows messages and text; knows no tokens.

Invariants: (1) the text equals that of transformers' `apply_chat_template` for the same messages; (2) a template, which comes with
a model and is untrusted, is rendered in a process with bounded time and memory; (3) the instructions are always in the prompt:
a template without a system role gets them at the head of the user's turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from research_rl.errors import ModelError
from research_rl.paths import PYTHON
from research_rl.pipeline.json_files import read_object

__all__ = ["ChatTemplate", "read_template", "special_tokens"]

_RENDERER = Path(__file__).with_name("_chat_renderer.py")
_BOUNDS = {"seconds": 1.0, "bytes": 1 << 30, "characters": 1 << 20}
"""Processor seconds and characters of one prompt, address space of the process that renders."""
_SYSTEM, _USER = "the instructions stand here", "the question stands here"
"""What a template is tried with."""


class ChatTemplate:
    """A chat template and the special tokens it may name; `origin` is the model folder that error messages name."""

    def __init__(self, source: str, variables: Mapping[str, str], origin: str) -> None:
        self.source, self.origin = source, origin
        self._variables = dict(variables)
        self._lock = threading.Lock()
        self._renderer: tuple[int, subprocess.Popen[str]] | None = None

    def render(self, system: str, question: str) -> str:
        """Return the prompt up to where the model's turn begins. Raises ModelError when the template cannot make one."""
        return self._answer(_messages(system, question, self.has_system_role))

    def render_user(self, text: str) -> str:
        """Return the prompt of a user's turn alone, without instructions of ours. Raises ModelError when the template cannot make one."""
        return self._answer([{"role": "user", "content": text}])

    @cached_property
    def has_system_role(self) -> bool:
        """Whether a system message reaches the prompt; else the user's turn carries it. Raises ModelError when neither does."""
        try:
            if self._shows_both(system_role=True):
                return True
            reason = "it drops the system message"
        except ModelError as error:
            reason = str(error)
        if self._shows_both(system_role=False):
            return False
        raise ModelError(
            f"the chat template of {self.origin} leaves messages out of the prompt ({reason}, and the user's turn is altered); "
            "use prompt.template base or file for this model"
        )

    def _shows_both(self, *, system_role: bool) -> bool:
        text = self._answer(_messages(_SYSTEM, _USER, system_role))
        return _SYSTEM in text and _USER in text

    def _answer(self, messages: list[dict[str, str]]) -> str:
        with self._lock:
            answer = self._exchange(messages)
        if "error" in answer:
            raise ModelError(
                f"the chat template of {self.origin} makes no prompt ({answer['error']}); "
                "use prompt.template base or file, or correct the template"
            )
        return answer["text"]

    def _exchange(self, messages: list[dict[str, str]]) -> dict[str, str]:
        # A forked process must not share its parent's pipes.
        if self._renderer is None or self._renderer[0] != os.getpid():
            self._renderer = os.getpid(), self._start()
        process = self._renderer[1]
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(messages) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        # The renderer ended before it read all of the request; `_why` says of what.
        except BrokenPipeError:
            line = ""
        if line:
            return cast(dict[str, str], json.loads(line))
        # The next question starts another: one that takes too long must not spoil those after it.
        self._renderer = None
        return {"error": _why(process)}

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [PYTHON, "-I", str(_RENDERER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        # Not __del__, which a process that exits need not call.
        weakref.finalize(self, _end, process)
        assert process.stdin
        process.stdin.write(json.dumps({"template": self.source, "variables": self._variables, **_BOUNDS}) + "\n")
        return process


def _messages(system: str, question: str, system_role: bool) -> list[dict[str, str]]:
    if system_role:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return [{"role": "user", "content": f"{system}\n\n{question}"}]


def _why(process: subprocess.Popen[str]) -> str:
    """Return why a renderer ended. It ends by itself only when its processor time is used up."""
    _, errors = process.communicate()
    last = (errors.strip().splitlines() or ["it wrote nothing"])[-1]
    return f"more than {_BOUNDS['seconds']:g} s" if process.returncode < 0 else f"its process ended with code {process.returncode}: {last}"


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream and not stream.closed:
            stream.close()


def read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template that a chat without tools uses, None when the model has none. `settings` is tokenizer_config.json.

    Files win over settings, as in transformers. Raises ModelError when there are several and none is the default.
    """
    templates = _files(folder) or _named(settings.get("chat_template"), folder)
    if templates and "default" not in templates:
        raise ModelError(f"{folder} has the chat templates {sorted(templates)} and none named 'default'; name the one to use so")
    return templates.get("default")


def _files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except UnicodeDecodeError as error:
        raise ModelError(f"a chat template of {folder} is not UTF-8 ({error}); download the model again") from None


def _named(value: Any, folder: Path) -> dict[str, str]:
    """Return the templates of the setting `chat_template`: a text, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError):
        raise ModelError(
            f"{folder}: chat_template is neither a text nor a list of name and template; repair tokenizer_config.json"
        ) from None


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens with a name (`bos_token`, ...), as a chat template sees them. `settings` is tokenizer_config.json.

    special_tokens_map.json counts only beside settings of the old form, which list no added tokens.
    """
    path = folder / "special_tokens_map.json"
    if path.is_file() and "added_tokens_decoder" not in settings:
        settings = {**settings, **read_object(path, ModelError, "download the model again")}
    extra = settings.get("extra_special_tokens")
    tokens = {**{name: value for name, value in settings.items() if name.endswith("_token")}, **(extra if isinstance(extra, dict) else {})}
    return {name: text for name, value in tokens.items() if (text := _text(value)) is not None}


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        return cast(dict[str, Any], token).get("content")
    return token if isinstance(token, str) else None
