"""What the README tells people to type exists; what it shows is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from research_rl import config
from research_rl.cli import _parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(research|make|\.venv/bin/prefect) ", line)
]


@pytest.mark.parametrize("words", [line for line in LINES if line[0] == "research"], ids=" ".join)
def test_research_commands_parse_and_their_parameters_exist(words: list[str]) -> None:
    arguments = _parse(words[1:])
    config.load_profile(getattr(arguments, "profile", None) or "laptop", getattr(arguments, "overrides", []))


@pytest.mark.parametrize("words", [line for line in LINES if line[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", [line for line in LINES if line[0].endswith("prefect")], ids=" ".join)
def test_deployments_exist(words: list[str]) -> None:
    flow, _, name = words[3].partition("/")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    entry = next(item["entrypoint"] for item in deployments if item["name"] == name)
    path, _, function = entry.partition(":")
    assert f'name="{flow}"' in (ROOT / path).read_text() and f"def {function}(" in (ROOT / path).read_text()


def test_links_and_images_lead_somewhere() -> None:
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
