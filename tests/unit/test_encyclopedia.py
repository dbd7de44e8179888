"""The fictional encyclopedia: formats, determinism, disjoint splits, answers that its passages support."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import EncyclopediaConfig
from research_rl.data import encyclopedia, names
from research_rl.data.names import Kind, Side
from research_rl.errors import ConfigError, DataError

SMALL = EncyclopediaConfig(entities=80, train_questions=64, dev_questions=16, test_questions=32, max_hops=3, comparison=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encyclopedia")
    encyclopedia.generate(SMALL, 7, path)
    return path


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def mentioned(folder: Path, split: str) -> set[str]:
    known = {name for kind in Kind for name in names.names(kind, Side.ENCYCLOPEDIA, SMALL.name_words)}
    return {name for name in known if any(name in json.dumps(row) for row in rows(folder, split))}


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_ones(folder: Path, tmp_path: Path) -> None:
    encyclopedia.generate(SMALL, 7, tmp_path / "again")
    encyclopedia.generate(SMALL, 8, tmp_path / "other")
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "other" / file.name).read_bytes() != file.read_bytes()


def test_files_have_the_flashrag_formats(folder: Path) -> None:
    corpus = rows(folder, "corpus")
    assert [row["id"] for row in corpus] == [str(number) for number in range(len(corpus))]
    assert all(row["contents"].startswith('"') and '"\n' in row["contents"] for row in corpus)
    assert len({row["contents"] for row in corpus}) == len(corpus)
    for split, number in (("train", 64), ("dev", 16), ("test", 32)):
        found = rows(folder, split)
        assert len(found) == number
        assert len({row["id"] for row in found}) == number
        assert all(set(row) == {"id", "question", "golden_answers", "metadata"} and row["golden_answers"] for row in found)


def test_splits_share_no_entity(folder: Path) -> None:
    train, dev, test = (mentioned(folder, split) for split in ("train", "dev", "test"))
    assert train and dev and test
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_every_hop_is_stated_by_its_passage_and_leads_to_the_next(folder: Path) -> None:
    corpus = {row["id"]: row["contents"] for row in rows(folder, "corpus")}
    for row in rows(folder, "train") + rows(folder, "test"):
        steps = row["metadata"]["question_decomposition"]
        assert len(steps) == row["metadata"]["hops"]
        assert {step["passage_id"] for step in steps} == set(row["metadata"]["supporting_passage_ids"])
        assert all(step["answer"] in corpus[step["passage_id"]] for step in steps)
        if row["metadata"]["type"] != "comparison":
            assert steps[-1]["answer"] == row["golden_answers"][0]
            assert all(first["answer"] in second["question"] for first, second in itertools.pairwise(steps))
            assert row["golden_answers"][0] not in row["question"]


def test_comparisons_agree_with_their_facts(folder: Path) -> None:
    compared = [row for row in rows(folder, "train") if row["metadata"]["type"] == "comparison"]
    assert {"yes", "no"} <= {row["golden_answers"][0] for row in compared}
    for row in compared:
        first, second = (step["answer"] for step in row["metadata"]["question_decomposition"])
        if row["golden_answers"][0] in ("yes", "no"):
            assert (row["golden_answers"][0] == "yes") == (first == second)
        else:
            older = row["metadata"]["question_decomposition"][int(int(second) < int(first))]
            assert row["golden_answers"][0] in older["question"]


def test_all_types_and_depths_and_aliases_occur(folder: Path) -> None:
    found = rows(folder, "train")
    assert {row["metadata"]["type"] for row in found} == {"bridge", "attribute", "comparison"}
    assert {row["metadata"]["hops"] for row in found if row["metadata"]["type"] == "bridge"} == {1, 2, 3}
    assert any(len(row["golden_answers"]) == 2 for row in found)


def test_warm_up_names_never_occur_in_the_encyclopedia(folder: Path) -> None:
    warm = encyclopedia.build_world(SMALL, random.Random(1), Side.WARMUP)
    text = (folder / "corpus.jsonl").read_text()
    assert not [entity.name for members in warm.splits.values() for entity in members if entity.name in text]


def test_a_longer_word_list_extends_a_shorter_one() -> None:
    assert names.words(Kind.PLACE, 1, 20)[:10] == names.words(Kind.PLACE, 1, 10)
    lists = [set(names.words(kind, position, 50)) for kind in Kind for position in (0, 1)]
    assert len(set().union(*lists)) == sum(map(len, lists))


def test_lexicon_covers_questions_and_passages(folder: Path) -> None:
    known = set(encyclopedia.lexicon(SMALL.name_words))
    for row in rows(folder, "corpus"):
        plain = row["contents"].replace('"', " ").replace(".", " . ")
        assert set(plain.split()) <= known
    for row in rows(folder, "train"):
        plain = row["question"].replace("?", " ? ").replace(".", " . ").replace(",", " , ")
        assert set(plain.split()) <= known


def test_more_distractors_mean_more_passages(folder: Path, tmp_path: Path) -> None:
    encyclopedia.generate(SMALL.model_copy(update={"distractors": 3}), 7, tmp_path)
    assert len(rows(tmp_path, "corpus")) > len(rows(folder, "corpus"))


def test_a_name_space_too_small_is_named_with_its_remedy(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"entities": 400, "name_words": 8})
    with pytest.raises(ConfigError, match=r"entities=400 .* name_words=8 .*raise name_words"):
        encyclopedia.generate(config, 0, tmp_path)


def test_too_many_questions_are_named_with_their_remedy(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"dev_questions": 5000})
    with pytest.raises(DataError, match=r"dev_questions=5000 exceeds .*raise entities"):
        encyclopedia.generate(config, 0, tmp_path)
