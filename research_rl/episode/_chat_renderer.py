"""Render one chat template in a process of its own: `chat.ChatTemplate` starts this file by path. Needs the standard library and Jinja.

A template comes with a model and is untrusted. Jinja's sandbox keeps it from Python's internals, but not from loops that never end or
from texts that fill the memory, so the system bounds this process: its address space once, its processor time anew for every request.
Reads JSON lines: first `{"template", "variables", "seconds", "bytes", "characters"}`, then one list of messages a line. Answers each
with one line, `{"text"}` or `{"error"}`. A request beyond its time ends the process, which is the answer.

The environment is that of transformers' `apply_chat_template` (`utils/chat_template_utils.py`), which takes seconds to import.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, ClassVar, NoReturn, TextIO

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["compiled", "main"]


class _Generation(Extension):
    """The block `{% generation %}`, which marks what the model writes; its body is rendered as it stands."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call of the block's body: like in transformers, variables set inside stay inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and & for HTML; in a prompt they stand for themselves, as in transformers.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(source: str) -> Template:
    """Return a template in the environment that published chat templates are written for. Raises TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment.from_string(source)


class _Renderer:
    def __init__(self, template: str, variables: dict[str, str], seconds: float, bytes: int, characters: int) -> None:
        # Soft and hard limit: the template cannot raise it again.
        resource.setrlimit(resource.RLIMIT_AS, (bytes, bytes))
        self._source, self._variables, self._seconds, self._characters = template, variables, seconds, characters
        self._template: Template | None = None

    def answer(self, messages: list[dict[str, str]]) -> dict[str, str]:
        """Return the text, or why there is none."""
        # Processor time, not the clock: a busy machine must not fail a good template. The signal's default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            text = self._text(messages)
        except Exception as error:  # noqa: BLE001 - the boundary: a template can make Jinja raise anything
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if len(text) > self._characters:
            return {"error": f"the text has {len(text)} characters, {self._characters} are allowed"}
        return {"text": text}

    def _text(self, messages: list[dict[str, str]]) -> str:
        # Compiled within the time limit: a template can take long to compile, too.
        self._template = self._template or compiled(self._source)
        return self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._variables)


def main(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    renderer = _Renderer(**json.loads(requests.readline()))
    for line in requests:
        print(json.dumps(renderer.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
