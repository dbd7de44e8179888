"""Whatever stands in a parameter, from the command line, a file or a flow's form, it is taken or refused with one short message.

What is taken can be hashed, written and read again. A sample runs by default, every parameter with every value with the marker `long`.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research_rl import config
from research_rl.cli import main
from research_rl.config import document
from research_rl.config.plain_yaml import MOST_BYTES
from research_rl.errors import ConfigError
from research_rl.pipeline.stages import STAGES
from tasks.job import resolve

SECRET = "hunter2"
TEXTS = [
    *("null", "true", "-1", "0", "1e308", ".inf", ".nan", "1" + "0" * 30, "1" * 5000, "0x" + "f" * 8000, "''", "' '", "x" * 100_000),
    *('"\\0"', '"\\ud800"', "2026-11-27", "2026-13-45", "2026-11-27T01:02:03Z", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "1:30"),
    *("{}", "[]", "[[[[]]]]", "[" * 3000, "{a: 1}", "{1: 2}", "{null: null}", "[1, a, null]", "{<<: {a: 1}}", "? [a]\n: b", "{[a]: b}"),
    *("[a,b", "@x", "%x", "&a *a", "--- a\n--- b", "!!python/object/apply:os.system [id]", "{a: &a [1], b: *a}", "{a: 1, a: 2}"),
    *(f"http://u:{SECRET}@h/x", f"https://h/x?access_token={SECRET}", f"https://h/x?a=1&X%2DAmz%2DSignature={SECRET}", "http://[::1"),
    *("../../etc/passwd", "\x1b[2J", "=", "<<: 1", "'" * 99),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 10**30, 16**8000, 1e308, float("inf"), float("nan"), "", "\0", "\ud800", "x" * 100_000, "a\nb: c", "[", "@x"),
    *([], [[[]]], {}, {"": 1}, {"a.b": {"c": [None]}}, [1, "a", None], {"\ud800": 1}, f"http://u:{SECRET}@h", [f"http://u:{SECRET}@h"]),
]
NAMES = [item.name for item in document.parameters() if "[]" not in item.name]
LONGEST_MESSAGE = 1200


def sections() -> list[str]:
    """Return one parameter of each type, each section, and each free mapping."""
    kinds = {item.type or item.name: item.name for item in document.parameters() if "[]" not in item.name}
    return list(kinds.values())


def held(found: config.Config, folder: Path) -> None:
    """What was taken can be hashed, written and read again."""
    for stage in STAGES.values():
        config.config_hash(found, stage.sections)
    path = folder / "params.yaml"
    config.save(found, path)
    assert config.load(path) == found


def refused(error: ConfigError) -> None:
    """A refusal is short and shows no secret."""
    assert len(str(error)) < LONGEST_MESSAGE and SECRET not in str(error), str(error)[:3000]


def tried(name: str, text: str, folder: Path) -> None:
    try:
        found = config.load_profile("laptop", [f"{name}={text}"])
    except ConfigError as error:
        refused(error)
    else:
        held(found, folder)


def cases(names: list[str], values: list[Any]) -> list[Any]:
    """Return every name and every value at least once, in as few pairs as that takes; values themselves are too odd to name a test."""
    count = max(len(names), len(values))
    return [pytest.param(names[at % len(names)], values[at % len(values)], id=f"{names[at % len(names)]}-{at}") for at in range(count)]


@pytest.mark.parametrize(("name", "text"), cases(sections(), TEXTS))
def test_a_value_on_the_command_line_is_taken_or_named(name: str, text: str, tmp_path: Path) -> None:
    tried(name, text, tmp_path)


@pytest.mark.parametrize(("name", "value"), cases(sections()[::-1], VALUES))
def test_a_value_of_a_flows_form_is_taken_or_named(name: str, value: Any, tmp_path: Path) -> None:
    try:
        found = resolve(tmp_path, None, {name: value})
    except ConfigError as error:
        refused(error)
    else:
        held(found, tmp_path)


@pytest.mark.parametrize(
    "name", ["", ".", "train.", ".train", "a..b", "train.steps.x.y", "\0", "\ud800", "x" * 9000, "a." * 9000, "=", "1"]
)
def test_a_name_that_no_parameter_has_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as of_the_flow:
        resolve(tmp_path, None, {name: 1})
    with pytest.raises(ConfigError) as of_the_command:
        config.load_profile("laptop", [f"{name}=1"])
    refused(of_the_flow.value)
    refused(of_the_command.value)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_takes_or_names_every_value(name: str, tmp_path: Path) -> None:
    for text, value in zip_longest(TEXTS, VALUES):
        tried(name, text, tmp_path)
        try:
            resolve(tmp_path, "laptop", {name: value})
        except ConfigError as error:
            refused(error)


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
@settings(max_examples=150)
def test_any_text_is_yaml_or_named(text: str) -> None:
    try:
        config.assignment(f"data.folder={text}")
    except ConfigError as error:
        refused(error)


BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]\n" for n in range(12))
FILES = {
    "an alias bomb": BOMB.encode(),
    "a huge file": b"data: {folder: " + b"x" * MOST_BYTES + b"}",
    "deep": b"[" * 100_000,
    "another encoding": "data: {folder: sch\xf6n}".encode("latin-1"),
    "UTF-16": "train: {steps: 3}".encode("utf-16"),
    "a program": b"\x7fELF\x02\x01\x01\x00",
    "a list": b"- 1",
    "a text": b"train",
    "cut": b"train: {steps: 3",
    "two documents": b"train: {steps: 3}\n---\ntrain: {steps: 4}\n",
    "an object": b"!!python/object/apply:os.system ['touch owned']",
    "a date of no calendar": b"seed: 2026-13-45",
    "no calendar as key": b"2026-13-45: 1",
    "a key twice": b"train: {steps: 3, steps: 4}",
    "a section twice": b"train: {steps: 3}\ntrain: {lr: 0.1}\n",
    "keys of other types": b"{1: 2, null: 3, [a]: 4}",
    "JSON": json.dumps({"train": {"steps": "many"}}).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_params_file_is_one_message_and_stays_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(FILES[name])
    for arguments in (["status"], ["config", "show"], ["run", "download"]):
        assert main([*arguments, "-w", str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert str(path) in shown.err and shown.err.count("\n") == 1 and len(shown.err) < LONGEST_MESSAGE and not shown.out
    assert [item.name for item in tmp_path.iterdir()] == ["params.yaml"] and path.read_bytes() == FILES[name]


def test_a_folder_or_a_device_in_place_of_params_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder" / "params.yaml").mkdir(parents=True)
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless" / "params.yaml").symlink_to("/dev/zero")
    for name in ("folder", "endless"):
        assert main(["status", "-w", str(tmp_path / name)]) == 1
        assert f"{name}/params.yaml" in (shown := capsys.readouterr().err) and shown.count("\n") == 1, shown


@pytest.mark.parametrize("workspace", ["/dev/null/w", "/proc/w", "/" + "x" * 300])
@pytest.mark.parametrize("verb", [["init"], ["run", "download", "-p", "laptop"], ["status", "-p", "laptop"], ["plan", "-p", "laptop"]])
def test_a_workspace_that_cannot_be_written_is_one_message(workspace: str, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*verb, "-w", workspace])
    shown = capsys.readouterr().err
    assert code in (0, 1) and (code == 0) == (not shown), shown
    assert shown.count("\n") <= 1 and len(shown) < LONGEST_MESSAGE, shown
    assert code == 1 or verb[0] in ("status", "plan")
