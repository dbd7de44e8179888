"""The wheel works by itself: built, installed into an empty environment, and driven from a folder that knows no checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from research_rl.config import profiles
from research_rl.paths import CHECKOUT

UV = [sys.executable, "-m", "uv"]
SMALL = ["data.generated.entities=120", "data.generated.train_questions=16", "data.generated.dev_questions=8"]
SMALL += ["data.generated.test_questions=8", "index.factory=Flat", "encoder.dim=64", "retriever.port=0"]
CHAIN = ("download", "validate", "prepare", "corpus", "embed", "index")


def uv(*arguments: object) -> None:
    """Run uv from its cache, which the set-up has filled with the locked versions; ask the registry only when that is not enough."""
    command = [*UV, *map(str, arguments)]
    if subprocess.run([*command, "--offline"], capture_output=True).returncode:
        subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, as setuptools leaves its build folders beside the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("research_rl", "configs"):
        shutil.copytree(CHECKOUT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    uv("build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", target, source)
    return next(target.glob("*.whl"))


class Installed:
    """An environment of its own that holds the wheel and what its extras declare, and a workspace that no checkout is near to."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.wheel, self.environment, self.home, self.workspace = wheel, folder / "venv", folder / "home", folder / "workspace"
        self.home.mkdir()
        self.workspace.mkdir()
        uv("venv", "--quiet", "--python", sys.executable, self.environment)

    def install(self, *extras: str) -> None:
        """Install the wheel with extras, in the versions of the pipeline's lock."""
        target, lock = f"research-rl[{','.join(extras)}] @ {self.wheel.as_uri()}", CHECKOUT / "requirements/pipeline.txt"
        uv("pip", "install", "--quiet", "--python", self.environment / "bin/python", "--constraint", lock, target)

    @property
    def variables(self) -> dict[str, str]:
        """Only what a shell of another user would have."""
        return {"HOME": str(self.home), "PATH": f"{self.environment}/bin:/usr/bin:/bin", "GX_ANALYTICS_ENABLED": "false"}

    def research(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the installed command in the workspace."""
        command = [str(self.environment / "bin/research"), *arguments]
        return subprocess.run(command, cwd=self.workspace, env=self.variables, capture_output=True, text=True)

    def answers(self, *arguments: str) -> str:
        """Return what a successful command printed."""
        done = self.research(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refuses(self, *arguments: str) -> str:
        """Return the one line that a refused command printed."""
        done = self.research(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        return done.stderr

    @contextmanager
    def retriever(self) -> Generator[str]:
        """Serve the workspace's index on a free port; yield the address."""
        command, log = [str(self.environment / "bin/research"), "serve-retriever"], self.workspace.parent / "retriever.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(command, cwd=self.workspace, env=self.variables, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout
            try:
                lines = (re.search(r"passages at (http://[\d.:]+)", line) for line in process.stdout)
                yield next((match[1] for match in lines if match), f"no address; {log.read_text()}")
            finally:
                process.terminate()
                process.wait(15)
                process.stdout.close()


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel with `retrieve` alone."""
    installed = Installed(wheel, tmp_path_factory.mktemp("installed"))
    installed.install("retrieve")
    assert "written (profile laptop)" in installed.answers("init", *SMALL)
    return installed


@pytest.fixture(scope="module")
def installed(bare: Installed) -> Installed:
    """The same environment with `evaluate` and `validate` added, and every stage up to the index built."""
    bare.install("retrieve", "evaluate", "validate")
    assert "download" in bare.answers("plan")
    for stage in CHAIN:
        assert bare.answers("run", stage).startswith(f"{stage}: ")
    return bare


def test_the_wheel_holds_every_file_that_the_package_reads(wheel: Path) -> None:
    package = CHECKOUT / "research_rl"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {f"research_rl/{path.relative_to(package)}" for path in files}
    expected |= {f"research_rl/profiles/{path.relative_to(CHECKOUT / 'configs')}" for path in (CHECKOUT / "configs").rglob("*.*")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


# The tests of a wheel without the extra stand first: the fixture `installed` adds it to the same environment.
def test_a_stage_without_its_library_names_the_extra(bare: Installed) -> None:
    assert bare.answers("run", "download").startswith("download: built")
    refused = bare.refuses("run", "validate")
    assert "the library great_expectations is not installed" in refused and "pip install 'research-rl[validate]'" in refused


@pytest.mark.long
def test_a_policy_environment_outside_a_checkout_must_be_named(installed: Installed) -> None:
    assert "environments.policy='.venv-policy/bin/python' is relative to a checkout" in installed.refuses("run", "policy")


@pytest.mark.long
def test_every_profile_is_read_from_the_wheel(installed: Installed) -> None:
    refused = installed.refuses("config", "show", "-p", "huge")
    assert all(repr(name) in refused for name in profiles())
    shown = yaml.safe_load(installed.answers("config", "show", "-p", "smollm"))
    assert shown["profile"] == "smollm"


@pytest.mark.long
def test_the_chain_from_download_to_index_is_current_and_leaves_the_installation_alone(installed: Installed) -> None:
    states = installed.answers("status").splitlines()
    assert [line.split()[:2] for line in states[: len(CHAIN)]] == [[stage, "current"] for stage in CHAIN]
    assert (installed.home / ".cache/research-rl/rates.json").is_file()
    assert not list(installed.environment.rglob(".cache")) and not list(installed.environment.rglob("artifacts"))


@pytest.mark.long
def test_a_served_retriever_answers_a_question(installed: Installed) -> None:
    corpus = next(installed.workspace.glob("data/**/*corpus*.jsonl"))
    passage = yaml.safe_load(corpus.read_text().splitlines()[0])
    with installed.retriever() as url:
        reply = httpx.post(f"{url}/search", json={"query": passage["contents"], "top_n": 3}, trust_env=False, timeout=30)
    assert reply.status_code == 200, reply.text
    assert passage["contents"] in [document["contents"] for document in reply.json()]


@pytest.mark.long
def test_the_prompt_of_a_profile_is_read_from_the_wheel(installed: Installed) -> None:
    code = "from research_rl import config; from research_rl.episode.prompts import render;"
    code += "print(render('Who?', config.load_profile('laptop').prompt))"
    command = [str(installed.environment / "bin/python"), "-c", code]
    done = subprocess.run(command, cwd=installed.workspace, env=installed.variables, capture_output=True, text=True)
    assert done.stdout.strip() == (CHECKOUT / "configs/prompts/laptop.txt").read_text().strip().replace("{question}", "Who?"), done.stderr
