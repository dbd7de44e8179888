"""The house style, measured: short functions, everything annotated, every module and public name described."""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("research_rl", "tasks", "flows") for path in (ROOT / folder).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines without the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    covered = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - covered


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_does_and_no_function_is_long(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert [f"{f.name}: {length(f)} lines" for f in functions(path) if length(f) > 60] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_is_described_and_annotated(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, Function) and not node.name.startswith("_")]
    assert [f.name for f in public if not ast.get_docstring(f)] == []
    assert [f.name for f in functions(path) if f.returns is None and f.name != "__init__"] == []


def test_the_tops_of_the_two_packages_stay_small() -> None:
    """What belongs to one concern lies in the folder of that concern."""
    method, tasks = (sorted(path.stem for path in (ROOT / name).glob("*.py")) for name in ("research_rl", "tasks"))
    assert len(method) <= 6, method
    assert len([name for name in tasks if name != "__init__"]) <= 17, tasks


def test_no_two_classes_have_one_name() -> None:
    """Whoever reads a name, or searches for it, meets one thing."""
    places = defaultdict[str, list[str]](list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_the_median_function_is_short() -> None:
    lengths = [length(function) for path in FILES for function in functions(path)]
    assert statistics.median(lengths) < 10
