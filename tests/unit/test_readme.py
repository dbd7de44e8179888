"""What the README and the pages under docs/ tell people to type exists; what the README shows is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from research_rl import config
from research_rl.cli import _parse, _shift_question
from research_rl.data.encyclopedia import generate
from research_rl.pipeline.stages import STAGES
from research_rl.planning import fleet

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
Command = tuple[str, ...]


def printed(text: str) -> Iterator[str]:
    """Yield the lines of the shell's blocks, and what a table of the README has as a command in its last column."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        without_files = "" if language not in ("", "sh") else re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.DOTALL | re.MULTILINE)
        yield from without_files.replace("\\\n", " ").splitlines()
    yield from re.findall(r"\| `((?:research|make|python|prefect) [^`]+)` \|$", text, re.MULTILINE)


def commands(line: str) -> Iterator[Command]:
    """Split a line of the shell into its commands, with a text for each value that the shell would put in."""
    line = re.sub(r'"\$\(.*\)[^"]*"', "TEXT", line)
    lexer = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&>"):
            # Behind `do`, and before the file of a `>`, the command stands.
            kept = words[1:] if words[:1] == ["do"] else words
            yield tuple(kept)
            words = []
        else:
            words.append(word)


def found(*starts: Command) -> list[Command]:
    """Return all commands of the pages that begin so."""
    every = {command: None for page in PAGES for line in printed(page.read_text(encoding="utf-8")) for command in commands(line)}
    return [command for command in every if any(command[: len(start)] == start for start in starts)]


RESEARCH = found(("research",))
MODULES = found(("python", "-m"), (".venv/bin/python", "-m"))
MAKE, RUNS = found(("make",)), found(("prefect", "deployment", "run"), (".venv/bin/prefect", "deployment", "run"))


def test_the_commands_of_tables_and_pages_are_found() -> None:
    assert ("research", "blame", "artifacts/baseline", "artifacts/evaluation", "--plan") in RESEARCH, "a row of the README's table"
    assert ("research", "ask", "serving.engine=sglang", "Which is older, Keri Tatras or Merdil Brusdron?") in RESEARCH, "a page"
    assert len(RESEARCH) > 60 and MODULES and len(MAKE) > 5 and len(RUNS) > 2


@pytest.mark.parametrize("words", RESEARCH, ids=" ".join)
def test_research_commands_parse_and_their_parameters_exist(words: Command) -> None:
    arguments = _parse(words[1:])
    if words[1] == "ask":
        _shift_question(arguments)
    overrides = list(getattr(arguments, "overrides", []))
    if overrides[:1] == ["retriever"]:
        _, overrides = fleet.asked(overrides[1:])
    config.load_profile(getattr(arguments, "profile", None) or "laptop", overrides)


def test_questions_to_the_model_are_about_the_encyclopedia_of_the_demo(tmp_path: Path) -> None:
    laptop = config.load_profile("laptop")
    generate(laptop.data.generated, laptop.data_seed, tmp_path)
    posed = {json.loads(line)["question"] for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()}
    asked = [command[-1] for command in RESEARCH if command[1] == "ask" and " " in command[-1]]
    assert len(asked) > 2 and set(asked) <= posed, "nobody can answer it"


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_modules_exist(words: Command) -> None:
    place = ROOT / words[2].replace(".", "/")
    assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_make_targets_exist(words: Command) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_deployments_exist(words: Command) -> None:
    flow, _, name = words[3].partition("/")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    entry = next(item["entrypoint"] for item in deployments if item["name"] == name)
    path, _, function = entry.partition(":")
    assert f'name="{flow}"' in (ROOT / path).read_text() and f"def {function}(" in (ROOT / path).read_text()


def test_links_and_images_lead_somewhere() -> None:
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_says_how_its_commands_are_found_before_the_first_of_them() -> None:
    """After `make demo` a new user typed what stood there and was told that there is no such command."""
    before = README.partition(". .venv/bin/activate")[0]
    typed = ("research", "dvc", "python", "prefect")
    assert before != README and not [line for line in printed(before) for command in commands(line) if command[:1] and command[0] in typed]


@pytest.mark.parametrize(
    ("page", "names"), [("own-model", "policy.source=folder"), ("gpu", "make setup-gpu"), ("cluster", "cluster.launcher")]
)
def test_an_own_model_a_gpu_machine_and_a_cluster_have_a_page_with_commands(page: str, names: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert f"docs/{page}.md" in README and names in text
    assert any(commands(line) for line in printed(text))


def test_git_ignores_what_a_run_in_the_checkout_writes() -> None:
    written = [*(f"{stage.folder}/manifest.json" for stage in STAGES.values()), ".services/run.lock", ".serving/retriever.pid", "mlflow.db"]
    written += ["mlartifacts/1/a", ".prefect/prefect.db", "prefect.toml", ".cache/model", "artifacts/.work/train-0/log"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *written], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == written, done.stderr
