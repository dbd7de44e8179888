"""What the validation measures: duplicates, defects, samples, and answers found in the corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from research_rl.data.flashrag import Question
from research_rl.errors import DataError
from tasks import statistics
from tasks.statistics import answered, measure_corpus, repeated, squeeze


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"id": identity, "contents": text}) + "\n" for identity, text in rows), encoding="utf-8")
    return path


def question(answers: tuple[str, ...], support: tuple[str, ...] = ()) -> Question:
    return Question("q", "Who?", answers, {"supporting_passage_ids": list(support)})


def quiet(rows: int) -> None:
    pass


def test_later_rows_of_a_repeated_value_are_marked() -> None:
    assert repeated(np.array([3, 1, 3, 3, 2, 1])).tolist() == [False, False, True, True, False, True]


def test_a_corpus_is_counted_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SHARD_ROWS", 2)
    path = write(
        tmp_path / "c.jsonl", [("a", "A\nred"), ("b", "B\nblue \ufffd"), ("c", "no title"), ("d", "A\nred"), ("e", "E\n" + "x" * 50)]
    )
    found = measure_corpus(path, {"b"}, 40, quiet)
    assert found.rows == 5 and [shard["rows"] for shard in found.shards] == [2, 2, 1]
    assert [shard["replacement"] for shard in found.shards] == [1, 0, 0]
    assert [shard["untitled"] for shard in found.shards] == [0, 1, 0]
    assert found.repeated_contents == 1 and found.examples["repeated_contents"] == ["row 4 repeats row 1"]
    assert found.longest == 52 and found.examples["longest"] == ["e (52 characters)"]
    assert found.kept == {"b": "B\nblue \ufffd"}


def test_the_sample_is_bounded_and_depends_on_the_corpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLE_ROWS", 10)
    path = write(tmp_path / "c.jsonl", [(str(row), f"T\ntext {row}") for row in range(500)])
    one, two = (measure_corpus(path, (), 1000, quiet).sample for _ in range(2))
    assert one == two and len(one) == 10
    assert any(int(row["id"]) >= 100 for row in one), "the sample must reach past the beginning"


def test_words_are_matched_whole() -> None:
    assert squeeze("Ann") not in squeeze("Anna left")
    assert squeeze("Ann Lee") in squeeze("It was ann, lee's sister's friend: ANN LEE!")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (question(("Paris",), ("s",)), True),
        (question(("Lyon",), ("s",)), True),
        (question(("Rome",), ("s",)), False),
        (question(("yes",)), True),
        (question(("Saint Paul", "Lyon")), True),
        (question(("?!",)), False),
    ],
    ids=["in support", "elsewhere in the corpus", "nowhere", "yes or no", "an alias", "no words"],
)
def test_an_answer_is_sought_in_support_then_everywhere(tmp_path: Path, asked: Question, expected: bool) -> None:
    path = write(tmp_path / "c.jsonl", [("s", "France\nIts capital is Paris."), ("t", "Rhone\nIt flows by Lyon; the Romance of it.")])
    kept = measure_corpus(path, {"s"}, 1000, quiet).kept
    assert answered([asked], kept, path, quiet) == [expected]


def test_no_second_pass_when_support_answers_all(tmp_path: Path) -> None:
    assert answered([question(("red",), ("a",))], {"a": "A\nred"}, tmp_path / "absent.jsonl", quiet) == [True]


def test_a_torn_line_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [("a", "A\nred")])
    path.write_text(path.read_text() + '{"id": "b", "cont')
    with pytest.raises(DataError, match=r"c\.jsonl:2"):
        measure_corpus(path, (), 100, quiet)
