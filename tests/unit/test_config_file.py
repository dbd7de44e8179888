"""params.yaml keeps what its owner wrote into it: comments survive a change of values, and a run that built nothing leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from research_rl import config
from research_rl.config import commented
from research_rl.errors import ConfigError

COMMENTED = """\
# our second try: fewer steps
profile: laptop
seed: 42  # the seed of the paper's appendix
data:
  # the small set
  train:  # two files
  - a.jsonl
  # the better half
  - b.jsonl

  # evaluation
  dev: [dev.jsonl]
train:
    steps: 24   # raised on Monday
    lr: 1e-6
    extra: {}   # nothing yet
# the end
"""


def saved(path: Path, *overrides: str) -> str:
    path.write_text(COMMENTED)
    config.save(config.load(path, overrides), path)
    return path.read_text()


def test_comments_and_layout_survive_a_change_of_values(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = saved(path, "train.steps=40", "data.train=[c.jsonl]", "train.extra={trainer.x: true}")
    for comment in (line.partition("#")[2] for line in COMMENTED.splitlines() if "#" in line):
        assert f"#{comment}" in text
    assert "    steps: 40   # raised on Monday" in text
    assert "  dev: [dev.jsonl]\n" in text
    assert "\nseed: 42  # the seed of the paper's appendix\n" in text
    read = config.load(path)
    assert (read.train.steps, read.train.lr, read.data.train, read.train.extra) == (40, 1e-6, ("c.jsonl",), {"trainer.x": True})
    assert yaml.safe_load(text) == read.model_dump(mode="json"), "the whole tree is there, for DVC and for people"


def test_saving_the_same_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = saved(path)
    assert config.save(config.load(path), path) is False
    assert config.update(config.load(path), path) == []
    assert path.read_text() == text


def test_without_comments_the_file_is_the_resolved_tree_in_one_form(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("{profile: laptop, seed: 3}")
    config.save(config.load(path), path)
    assert path.read_text() == config.dump(config.load(path))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: 1 # x\n", {"a": {"b": [1, "on", None, "it's # no comment", 1e-6]}}),
        ("a: |\n  text\n  more\n# x\nb: 1\n", {"a": "text\nmore\n", "b": 2}),
        ("a: # x\n  b: 1\nc: 2\n", {"a": {"b": 1, "d": "new"}, "c": 2, "e": []}),
        ("a:\n- 1\n- 2 # y\nb: {c: 1} # x", {"a": [3], "b": {"c": 1, "d": 2}}),
        ("# x\na:\nb: ''\n", {"a": 1, "b": None}),
        ("a: '#1' # x\nb: \"#2\"\n", {"a": "#2", "b": "#2"}),
    ],
)
def test_the_text_reads_as_what_was_asked_for_and_loses_no_comment(before: str, after: dict[str, object]) -> None:
    text = commented.merged(before, after)
    assert text is not None
    assert yaml.safe_load(text) == after
    assert all(mark in text for mark in ("# x", "# y") if mark in before)


@pytest.mark.parametrize("before", ["- 1 # a list\n", "a: [ # torn\n", "a: 1 # x\nb: 2\n", "# nothing\n"])
def test_what_cannot_be_edited_is_written_anew(before: str) -> None:
    assert commented.merged(before, {"a": 2}) is None


def failing(path: Path, said: list[str], resolved: config.Config, work: Callable[[config.Written], object]) -> None:
    """Run `work` with params.yaml written, and fail afterwards."""
    with config.written(resolved, path, said.append) as parameters:
        work(parameters)
        raise ConfigError("no such thing")


def test_a_run_that_fails_before_it_builds_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Its overrides stayed in params.yaml: the stages that they decide were stale, though nothing had been built."""
    path, said, steps = tmp_path / "params.yaml", list[str](), list[int]()
    path.write_text(COMMENTED)
    with pytest.raises(ConfigError, match="no such thing"):
        failing(path, said, config.load(path, ["train.steps=40"]), lambda _: steps.append(config.load(path).train.steps))
    assert steps == [40], "it says what runs while it runs"
    assert path.read_text() == COMMENTED
    assert said[-1] == "params.yaml put back as it was: nothing was built"
    path.unlink()
    with pytest.raises(ConfigError):
        failing(path, said, config.load_profile("laptop"), lambda _: None)
    assert not path.exists()


def test_once_something_is_built_the_file_says_from_what(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(COMMENTED)
    with pytest.raises(ConfigError):
        failing(path, [], config.load(path, ["train.steps=40"]), lambda parameters: parameters.keep())
    assert config.load(path).train.steps == 40


def test_an_edit_in_the_meantime_wins(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(COMMENTED)
    with pytest.raises(ConfigError):
        failing(path, [], config.load(path, ["train.steps=40"]), lambda _: path.write_text("seed: 7\n"))
    assert path.read_text() == "seed: 7\n"
