"""What a build sends to Docker: all that the images need, and nothing else of a checkout. The rules are those of Docker's SDK."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from research_rl.paths import CHECKOUT
from tasks.limits import PROJECTS
from tasks.local.pools import TEMPLATES

PACKAGES = ("research_rl", "tasks", "flows", "configs")
DOCKERFILES = sorted((CHECKOUT / "infra/docker").glob("*.Dockerfile"))
SECRETS = (".env", ".netrc", "server.pem", "server.key", "prefect.toml", "id_ed25519", ".env.production", "keys.json", "secrets.yaml")
PLACES = (
    "",
    "infra",
    "infra/prefect",
    "research_rl",
    "research_rl/agent",
    "tasks/local",
    "flows",
    "configs",
    "configs/prompts",
    "requirements",
    "docs",
)
OTHERS = (".dvc/config.local", ".git/config", "tasks/.venv/lib/site.py", ".venv/pyvenv.cfg", ".services/stack/keys.json", "mlflow.db")


def context(root: Path) -> set[str]:
    """Return the files below `root` that a build is sent."""
    rules = [line for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {path for path in exclude_paths(str(root), rules, dockerfile="absent") if not (root / path).is_dir()}


@pytest.fixture(name="checkout")
def _checkout(tmp_path: Path) -> Path:
    """The names of a checkout's files, without their content."""
    shipped = [path for folder in PACKAGES for path in (CHECKOUT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    top = [CHECKOUT / name for name in ("pyproject.toml", "README.md", "LICENSE", "prefect.yaml", "dvc.yaml", "params.yaml")]
    locks = [*(CHECKOUT / "requirements").glob("*.txt"), CHECKOUT / "requirements/install.py"]
    for path in (*shipped, *top, *locks, *TEMPLATES.values(), *PROJECTS):
        copy = tmp_path / path.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    return tmp_path


def test_a_build_gets_every_file_of_the_packages(checkout: Path) -> None:
    names = {os.path.relpath(path, checkout) for path in checkout.rglob("*") if path.is_file()}
    assert len(names) > 200 and names - context(checkout) == set()


def test_a_build_gets_no_secret_and_no_environment(checkout: Path) -> None:
    sent = context(checkout)
    planted = [f"{place}/{name}".lstrip("/") for place in PLACES for name in SECRETS if (place, name) != ("configs", "secrets.yaml")]
    for name in (*planted, *OTHERS):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("secret")
    assert context(checkout) == sent


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_a_dockerfile_copies_is_sent(path: Path, checkout: Path) -> None:
    copied = [name for line in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", path.read_text(), re.M) for name in line.split()]
    sent = context(checkout)
    for name in (item.replace("${ENGINE}", "vllm").rstrip("/").removeprefix("./") for item in copied):
        assert name == "." or any(item == name or item.startswith(f"{name}/") for item in sent), name
