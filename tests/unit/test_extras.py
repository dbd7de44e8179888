"""Every optional library belongs to an extra of the wheel, and every lock lies within the ranges that the wheel declares."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from functools import cache

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from research_rl.errors import ConfigError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.extras import EXTRAS, missing_extras, require

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
LOCKS: dict[str, tuple[str, ...]] = {
    "pipeline": ("pipeline", "encode", "ray"),
    "policy": ("policy-cpu",),
    "retriever": ("retrieve",),
    "retriever-torch": ("retrieve", "encode"),
    # s3: a trainer copies its checkpoints away.
    "gpu-train-vllm": ("policy", "s3"),
    "gpu-train-sglang": ("trainer", "serve", "s3"),
    "gpu-serve": ("serve",),
    "serve": ("serve",),
    "gpu-index": ("encode",),
    "gpu-host": ("policy",),
}
"""Lock -> the extras whose work is done in that environment."""
OF_THE_HOST = {"gpu-host": {"httpx", "jinja2", "numpy", "psutil", "pyyaml", "torch"}, "gpu-index": {"psutil"}}
"""What a lock leaves to the machine that it is installed on."""


@cache
def distributions() -> dict[str, set[str]]:
    """Return the installed distributions that provide each top-level module; reading them all takes a second."""
    return {module: {canonicalize_name(name) for name in names} for module, names in importlib.metadata.packages_distributions().items()}


@cache
def needed_by(distribution: str) -> frozenset[str]:
    """Return what an installed distribution requires, directly and in turn, itself included."""
    names, waiting = set[str](), [distribution]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            required = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [canonicalize_name(item.name) for item in required if not item.marker or item.marker.evaluate({"extra": ""})]
    return frozenset(names)


def requirements(*extras: str) -> Iterator[Requirement]:
    """Yield what the extras declare, those that they name in turn included."""
    for extra in extras:
        for item in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if item.name == PROJECT["name"]:
                yield from requirements(*sorted(item.extras))
            else:
                yield item


def pins(lock: str) -> dict[str, Version]:
    lines = (CHECKOUT / "requirements" / f"{lock}.txt").read_text().splitlines()
    if lock in ("pipeline", "policy", "serve", "retriever-torch"):  # torch's CPU build is installed by itself
        lines.append(runpy.run_path(str(CHECKOUT / "requirements/install.py"))["TORCH"])
    found = (re.match(r"([\w.-]+)(?:\[.*\])?==([^\s;]+)", line) for line in lines)
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_lies_within_the_ranges_of_the_wheel(lock: str) -> None:
    base = [] if lock in ("gpu-serve", "serve") else [Requirement(item) for item in PROJECT["dependencies"]]
    declared, pinned = [*base, *requirements(*LOCKS[lock])], pins(lock)
    names = {canonicalize_name(item.name) for item in declared}
    assert names - set(pinned) == OF_THE_HOST.get(lock, set())
    outside = [
        f"{item} but {pinned[canonicalize_name(item.name)]}"
        for item in declared
        if canonicalize_name(item.name) in pinned and not item.specifier.contains(pinned[canonicalize_name(item.name)], prereleases=True)
    ]
    assert outside == []


@pytest.mark.parametrize("lock", ["retriever", "retriever-torch"])
def test_a_retriever_runs_with_the_versions_of_the_pipeline_and_with_all_that_they_need(lock: str) -> None:
    """Its image is installed without resolving, so that a requirement of a requirement must stand in the lock."""
    pinned, whole = pins(lock), pins("pipeline")
    assert {name: version for name, version in pinned.items() if whole.get(name) != version} == {}
    roots = [canonicalize_name(item.name) for item in (*map(Requirement, PROJECT["dependencies"]), *requirements(*LOCKS[lock]))]
    assert {name for root in roots for name in needed_by(root)} - set(pinned) == set()
    assert ("torch" in pinned) is (lock == "retriever-torch")


@pytest.mark.parametrize("lock", ["gpu-train-vllm", "gpu-train-sglang"])
def test_a_trainer_uploads_with_the_versions_of_the_pipeline(lock: str) -> None:
    pinned, whole = pins(lock), pins("pipeline")
    needed = needed_by("boto3")
    assert len(needed) > 5 and {name: pinned.get(name) for name in needed} == {name: whole[name] for name in needed}


def test_every_lock_is_held_by_a_range() -> None:
    assert {path.stem for path in (CHECKOUT / "requirements").glob("*.txt")} == set(LOCKS)


def test_the_gpu_builds_lie_within_the_ranges_of_the_wheel() -> None:
    flash = re.search(r"flash-attn==(\S+?);", (CHECKOUT / "infra/docker/trainer.Dockerfile").read_text())
    assert flash
    versions = {"faiss-gpu": pins("gpu-index")["faiss-gpu"], "flash-attn": Version(flash[1])}
    assert {item.name: item.specifier.contains(versions[item.name]) for item in requirements("gpu")} == dict.fromkeys(versions, True)


def imported() -> set[str]:
    """Return the top-level names of what research_rl imports in the pipeline's environment, at a module's head or inside a function."""
    names: set[str] = set()
    for path in (CHECKOUT / "research_rl").rglob("*.py"):
        if "policy_env" in path.parts:  # the trainer's environment is installed as a whole
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_module":
                names |= {str(item.value).partition(".")[0] for item in node.args if isinstance(item, ast.Constant)}
    return names - set(sys.stdlib_module_names) - {"research_rl"}


def test_every_library_is_a_dependency_or_belongs_to_an_extra() -> None:
    base = {canonicalize_name(Requirement(item).name) for item in PROJECT["dependencies"]}
    assert {name for name in imported() if not base & distributions()[name]} == set(EXTRAS)


@pytest.mark.parametrize("library", EXTRAS)
def test_the_extra_of_a_library_installs_it(library: str) -> None:
    assert any(distributions()[library] & needed_by(canonicalize_name(item.name)) for item in requirements(EXTRAS[library]))


def test_a_missing_optional_library_is_one_error_that_names_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"great_expectations is not installed .*pip install 'research-rl\[validate\]'"), missing_extras():
        raise ModuleNotFoundError("No module named 'great_expectations.core'", name="great_expectations.core")


def test_a_long_stage_asks_for_its_library_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    require("great_expectations", "pandas")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "Stemmer", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'research-rl\[retrieve\]'"):
        require("Stemmer")


def test_another_missing_module_is_no_extra() -> None:
    with pytest.raises(ModuleNotFoundError), missing_extras():
        import research_rl.nowhere  # type: ignore[import-not-found]  # noqa: F401
