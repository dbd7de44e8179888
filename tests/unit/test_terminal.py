"""Text of data, models, servers and errors reaches a terminal or a log through `research_rl.terminal` alone."""

from __future__ import annotations

import ast
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from research_rl import terminal
from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT
from research_rl.terminal import guard_logs, say, say_json

EVIL = "\x1b]0;title\x07\x9b2J\u202e\r\x7f"
FILES = sorted(path for folder in ("flows", "tasks", "research_rl") for path in (CHECKOUT / folder).rglob("*.py"))
EXCEPTIONS = {
    "research_rl/terminal.py": "has the guarded functions",
    "research_rl/episode/_chat_renderer.py": "writes JSON, whose escapes are ASCII, to the pipe of the process that started it",
    "research_rl/training/policy_env/compose.py": "writes JSON to the pipe of the process that started it",
    "research_rl/training/policy_env/load_check.py": "writes JSON to the pipe of the process that started it",
    "research_rl/training/policy_env/warmup.py": "writes JSON to the pipe of the process that started it",
}
SINKS = ("stdout", "stderr", "__stdout__", "__stderr__")


def is_safe(node: ast.expr) -> bool:
    """Whether a text is a constant, or made printable."""
    match node:
        case ast.Constant():
            return True
        case ast.Call(func=ast.Name(id="printable")):
            return True
        case ast.BinOp(left=left, right=right):
            return is_safe(left) and is_safe(right)
        case ast.JoinedStr(values=values):
            return all(is_safe(value) for value in values)
        case ast.FormattedValue(value=value):
            return is_safe(value)
        case ast.IfExp(body=body, orelse=other):
            return is_safe(body) and is_safe(other)
        case _:
            return False


def texts(call: ast.Call) -> list[ast.expr]:
    """Return what a call writes to a standard stream; nothing for every other call."""
    match call.func:
        case ast.Name(id="print" | "pprint"):
            return [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in ("sep", "end"))]
        case ast.Attribute(value=stream, attr="write" | "writelines"):
            named = {node.attr for node in ast.walk(stream) if isinstance(node, ast.Attribute)}
            return call.args if named & {*SINKS} else []
        case ast.Name(id="SystemExit") | ast.Attribute(value=ast.Name(id="sys"), attr="exit"):
            return [item for item in call.args if isinstance(item, ast.JoinedStr | ast.BinOp)]
        case _:
            return []


def unguarded(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that write a text of which a part may come from outside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not all(is_safe(text) for text in texts(node)):
            yield node.lineno
        # As a function that is called later, for example with a line of a log.
        passed = [*node.args, *(item.value for item in node.keywords)] if isinstance(node, ast.Call) else []
        yield from (item.lineno for item in passed if isinstance(item, ast.Name) and item.id == "print")


def test_only_the_guarded_functions_print_what_is_no_constant() -> None:
    found = {path.relative_to(CHECKOUT).as_posix(): list(unguarded(ast.parse(path.read_text()))) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines and name not in EXCEPTIONS} == {}
    assert [name for name in EXCEPTIONS if not found[name]] == [], "no exception that nothing needs"


@pytest.mark.parametrize(
    ("code", "guarded"),
    [
        ("print()", True),
        ("print('a', file=sys.stderr)", True),
        ("print(error)", False),
        ("print(f'research: {error}', file=sys.stderr)", False),
        ("print('a', end=error)", False),
        ("sys.stdout.write(printable(text) + '\\n')", True),
        ("sys.stdout.write(text)", False),
        ("sys.stderr.buffer.write(text)", False),
        ("stream.write(text)", True),
        ("raise SystemExit(f'no {name}')", False),
        ("raise SystemExit(main())", True),
        ("run(say=print)", False),
    ],
)
def test_the_check_sees_what_is_written(code: str, guarded: bool) -> None:
    assert (list(unguarded(ast.parse(code))) == []) == guarded


def test_what_is_said_holds_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {EVIL} b\nc")
    say(EVIL, sys.stderr, end="")
    printed = capsys.readouterr()
    shown = "\\x1b]0;title\\x07\\x9b2J\\u202e\\x0d\\x7f"
    assert (printed.out, printed.err) == (f"a {shown} b\nc\n", shown)


def test_json_is_printable_and_still_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {f"key {EVIL}": ["東京", "\ud800", "\\x7f", "\x7f"]}
    say_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert printed.removesuffix("\n").isprintable()


@pytest.fixture
def guarded() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    guard_logs()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.usefixtures("guarded")
def test_a_log_line_of_any_library_holds_no_control_character() -> None:
    stream = io.StringIO()
    logger, handler = logging.getLogger("some.library"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.warning("the server answered %s", EVIL)
        raise ServiceError(EVIL)
    except ServiceError:
        logger.exception("no answer")
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert "answered \\x1b]0;title" in text and "ServiceError: \\x1b]0;title" in text
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("start", ["import flows", "from research_rl.cli import main; main(['config', 'show', '-p', 'laptop'])"])
def test_flows_and_the_command_line_guard_their_logs(start: str) -> None:
    code = f"{start}\nimport logging; logging.warning('%s', chr(27))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith("WARNING:root:\\x1b\n")


def test_a_guard_is_set_once_however_often_it_is_called(guarded: None) -> None:
    guard_logs()
    assert logging.getLogRecordFactory() is terminal._SafeRecord
