"""The project's files are found in a checkout, and from a folder that holds the package alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from research_rl import paths


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the package as a wheel installs it: the profiles inside, no checkout around it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(paths.CHECKOUT / "research_rl", folder / "research_rl", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def ask(site: Path, expression: str, **variables: str) -> str:
    code = f"from research_rl import paths; print({expression})"
    env = {"HOME": "/home/reader", "PATH": "/usr/bin", "PYTHONPATH": str(site), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=site)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/reader/.cache/research-rl"),
        ({"XDG_CACHE_HOME": "/fast"}, "/fast/research-rl"),
        ({"XDG_CACHE_HOME": "/fast", "RESEARCH_CACHE": "/chosen"}, "/chosen"),
    ],
)
def test_an_installed_wheel_caches_in_the_users_folder(site: Path, variables: dict[str, str], folder: str) -> None:
    assert ask(site, "paths.cache_folder()", **variables) == folder


def test_a_checkout_caches_in_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESEARCH_CACHE", raising=False)
    assert paths.cache_folder() == paths.CHECKOUT / ".cache"


def test_an_installed_wheel_gives_other_interpreters_none_of_its_libraries(site: Path) -> None:
    assert ask(site, "paths.python_path('/more'), str(paths.RUN_FROM)") == f"{{}} {sys.prefix}"
    assert paths.python_path("/more", None) == {"PYTHONPATH": f"{paths.CHECKOUT}:/more"}


def test_a_relative_interpreter_needs_a_checkout(site: Path) -> None:
    asked = "paths.interpreter_path({!r}, 'environments.policy')"
    refused = ask(site, asked.format(".venv-policy/bin/python"))
    assert "ConfigError: environments.policy='.venv-policy/bin/python' is relative to a checkout" in refused
    assert "set environments.policy to the absolute path" in refused
    assert ask(site, asked.format("/opt/policy/bin/python")) == "/opt/policy/bin/python"


def test_a_shipped_file_has_one_name_in_checkout_and_wheel(site: Path) -> None:
    name = "configs/prompts/laptop.txt"
    assert ask(site, f"paths.shipped_file({name!r})") == str(site / "research_rl/profiles/prompts/laptop.txt")
    assert paths.shipped_file(name) == paths.CHECKOUT / name
    assert paths.shipped_file(name).is_file() and (site / "research_rl/profiles/prompts/laptop.txt").is_file()


def test_the_interpreter_is_found_from_any_folder_where_path_names_it_relatively() -> None:
    """As in `PATH=.venv/bin:$PATH python`, by which DVC starts the stages."""
    code = "from research_rl.paths import PYTHON; print(PYTHON)"
    environment = {"PATH": "bin", "PYTHONPATH": str(paths.CHECKOUT)}
    told = subprocess.run(["python", "-c", code], cwd=sys.prefix, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(Path(sys.prefix) / "bin/python")
