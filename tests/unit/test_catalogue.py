"""A bare set name stands for the file of the split; a set without that split is refused."""

from __future__ import annotations

import pytest

from research_rl.data.catalogue import SETS, expand
from research_rl.errors import ConfigError


def test_names_become_files_of_their_split() -> None:
    assert expand("musique", "train") == "musique/train.jsonl"
    assert [expand(name, "test") for name in SETS] == [
        "musique/dev.jsonl",
        "hotpotqa/dev.jsonl",
        "2wikimultihopqa/dev.jsonl",
        "bamboogle/test.jsonl",
        "nq/test.jsonl",
        "triviaqa/test.jsonl",
        "popqa/test.jsonl",
    ]
    assert expand("mine/other.jsonl", "dev") == "mine/other.jsonl"


def test_a_split_the_set_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data.train=bamboogle has no split train, only test"):
        expand("bamboogle", "train")
