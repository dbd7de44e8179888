"""Hostile values through the command itself: every parameter of the tree, every option, every file that a stage reads.

A refusal is exit code 1 and one line with the remedy; nothing is half-written and memory stays bounded. By default each parameter is
tried with a few of the values, with the marker `long` with all of them.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from research_rl.cli import main
from research_rl.config import document
from tests.unit.test_hostile_parameters import LONGEST_MESSAGE, SECRET, TEXTS

SPARE = 1 << 28
"""Bytes that a refused value may take, beside what stands."""
PARAMETERS = [item for item in document.parameters() if "[]" not in item.name]
# Of the right type and yet hostile, by the first words of the documented type.
FITTING = {
    "int": ["0", "1", "9223372036854775807"],
    "float": ["0", "5e-324", "1.7976931348623157e308"],
    "text": ['"\\e[2J"', "../..", "x" * 20_000, "é#?%20 []", "'http://[::1'", "/dev/zero"],
    "list": ["[]", "['']", "[a, a]", "[../../x]", "[/dev/zero]"],
    "mapping": ["{}", "{'': 1}", "{a: [b]}", "{/x: ..}"],
    "true": ["'true'", "2"],
}  # fmt: skip
VERBS = (["run", "prepare"], ["init"], ["plan"], ["config", "show"], ["status"])


@dataclass(frozen=True)
class Called:
    """What a command did: its exit code, and what it wrote on standard output and error."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def bounded(spare: int = SPARE) -> Generator[None]:
    """Let this process take so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_DATA, (int(fields["VmData"].split()[0]) * 1024 + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Called:
    capsys.readouterr()
    try:
        with bounded():
            code = main(arguments)
    except SystemExit as error:
        code = int(str(error.code))
    shown = capsys.readouterr()
    return Called(code, shown.out, shown.err)


def require(called: Called, name: str = "") -> None:
    """One short line with a remedy where the command refuses, and no word of complaint where it does not."""
    told = called.err[:3000]
    assert called.code in (0, 1), told
    assert SECRET not in called.err + called.out and "\x1b" not in called.err + called.out, told
    if called.code == 0:
        assert not called.err, told
        return
    *before, message = called.err.splitlines()
    assert message.startswith("research: ") and len(called.err) < LONGEST_MESSAGE, told
    assert not any(line.startswith(("research: ", "Traceback")) for line in before) and (not before or not name), told
    assert name in called.err or "missing, torn or built from other parameters" in called.err, told


def pairs(parameter: document.DocumentedParameter, place: int, odd: int) -> Iterator[tuple[list[str], str]]:
    """Yield verbs and values for the parameter at a place: `odd` of the values of any type, and all that fit its type."""
    values = [TEXTS[(place * odd + step) % len(TEXTS)] for step in range(odd)]
    fitting = FITTING.get(parameter.type.split(",")[0].split()[0], ["laptop"]) if parameter.type else ["{}", "{x: 1}"]
    values += fitting if odd >= len(TEXTS) else [fitting[place % len(fitting)]]
    turn = count(place)
    yield from ((VERBS[next(turn) % len(VERBS)], value) for value in values)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standing")
    assert main(["init", "-w", str(folder)]) == 0
    assert main(["run", "prepare", "-w", str(folder)]) == 1  # leaves the locks that any run leaves
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the locks, in which stands who held them last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tried(parameter: document.DocumentedParameter, place: int, odd: int, standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(standing)
    for verb, value in pairs(parameter, place, odd):
        folder = standing / "new" if verb == ["init"] else standing
        called = call(capsys, *verb, "-w", str(folder), f"{parameter.name}={value}")
        require(called, parameter.name.split(".")[0])
        new = standing / "new" / "params.yaml"
        assert new.is_file() if verb == ["init"] and called.code == 0 else not new.parent.exists(), value[:200]
        if new.is_file():
            assert [item.name for item in new.parent.iterdir()] == [new.name]
            new.unlink()
            new.parent.rmdir()
    assert contents(standing) == before


SECTIONS = list(dict.fromkeys(item.name.split(".")[0] for item in PARAMETERS))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_parameter_takes_or_names_a_few_values_and_nothing_is_left(
    section: str, standing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, parameter in enumerate(PARAMETERS):
        if parameter.name.split(".")[0] == section:
            tried(parameter, place, 2, standing, capsys)


@pytest.mark.long
@pytest.mark.parametrize("place", range(len(PARAMETERS)), ids=[item.name for item in PARAMETERS])
def test_every_parameter_takes_or_names_every_value_and_nothing_is_left(
    place: int, standing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried(PARAMETERS[place], place, len(TEXTS), standing, capsys)


@pytest.mark.parametrize("given", ["x" * 20_001, "/" * 19_999, "http://" + "x" * 19_000])
def test_a_text_of_many_thousand_characters_is_named_by_its_beginning_alone(
    given: str, standing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A parameter's own check once put all of it into its message."""
    texts = [item for item in PARAMETERS if item.type.startswith(("text", "list of text"))]
    assert len(texts) > 40
    for parameter in texts:
        value = f"[{given}]" if parameter.type.startswith("list") else given
        require(call(capsys, "config", "show", "-w", str(standing), f"{parameter.name}={value}"), parameter.name.split(".")[0])


OPTIONS: dict[str, tuple[list[str], int]] = {
    "no stage": (["run", "x" * 5000], 1),
    "a stage of odd characters": (["run", "\x1b[2J\ud800"], 1),
    "no profile": (["status", "-p", "../../etc/passwd"], 1),
    "an endless profile": (["status", "-p", "x" * 9000], 1),
    "no verb": (["trian"], 2),
    "no number": (["evaluate", "--samples", "many"], 2),
    "no method": (["evaluate", "--method", "x" * 5000], 1),
    "no set": (["evaluate", "--set", "\x1b[2J"], 1),
    "no part": (["serve-retriever", "--part", "3/2"], 1),
    "a part of words": (["serve-retriever", "--part", "a/b"], 1),
    "a part without end": (["serve-retriever", "--part", "1/" + "9" * 5000], 1),
    "no model": (["serve-model", "--model", "/dev/null"], 1),
    "a model of odd characters": (["ask", "Who?", "--model", "\x1b[2J"], 1),
    "no evaluation": (["compare", "@previous", "\x1b[2J"], 1),
    "a file for an evaluation": (["compare", "/dev/null", "/dev/zero"], 1),
    "no cells": (["blame", "x" * 5000, ".", "--plan"], 1),
    "no folder to judge": (["judge", "/dev/null", "--model", "m"], 1),
    "no preset": (["judge", ".", "--preset", "\x1b[2J", "--model", "m"], 1),
    "no challenger": (["gate", "--challenger", "x" * 5000], 1),
    "no backup": (["restore", "/dev/null"], 1),
    "a backup into a device": (["backup", "/dev/null"], 1),
    "no fleet": (["plan", "retriever", "passages=many"], 1),
    "a fleet of nothing": (["plan", "retriever", "passages=-1", "qps=0"], 1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_hostile_option_is_one_message_and_nothing_is_left(name: str, standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code = OPTIONS[name]
    before = contents(standing)
    called = call(capsys, arguments[0], "-w", str(standing), *arguments[1:])
    assert called.code == code, called
    if code == 1:
        require(called, "")
    assert contents(standing) == before
