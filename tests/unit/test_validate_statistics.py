"""What the validation measures: words, lengths, defects, duplicates, samples, and answers found in the corpus."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from research_rl.reward.words import words as split
from research_rl.validation import corpus
from research_rl.validation.answers import Sought
from research_rl.validation.columns import encoding_defects, keys, words
from research_rl.validation.corpus import CorpusStatistics, measure_corpus, repeated

# Beside Latin: Han, kana with a voiced mark of its own, Thai, Lao and Khmer with vowel signs, Arabic with a vowel sign and the
# lengthening stroke, Hindi with marks and joiners, Hangul, full-width forms, and accents that stand by themselves.
ALPHABET = [
    *"ab cé ßÅ.,-—’\n_9 Ωж中日ガｶーか한ㅎＡ９。、।´ـ٣هकष१\u200d\u00ad",
    *("か\u3099", "กิ่", "าลี", "ລີ", "កុ្ក", "عَ", "بْ", "हि", "न्", "한"),
]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"id": identity, "contents": text}) + "\n" for identity, text in rows), encoding="utf-8")
    return path


def measured(path: Path, answers: tuple[str, ...] = (), ids: tuple[str, ...] = (), max_chars: int = 1000) -> CorpusStatistics:
    return measure_corpus(path, Sought.of(answers, ids), max_chars, path.parent / "scratch", lambda rows: None)


def column(texts: list[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def test_words_are_those_of_the_tokenizer() -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randrange(40))) for _ in range(4000)]
    expected = [tuple(split(text)) for text in texts]
    found = words(column(texts))
    assert found.counts.tolist() == [len(item) for item in expected]
    same: dict[int, set[tuple[str, ...]]] = {}
    for key, item in zip(found.row_keys().tolist(), expected, strict=True):
        same.setdefault(key, set()).add(item)
    assert all(len(items) == 1 for items in same.values()), "different words, same key"
    assert len(same) == len(set(expected)), "same words, different keys"


def test_keys_tell_texts_of_any_length_apart() -> None:
    texts = ["", "a", "a\0", "b", "12345678", "123456789", "x" * 16, "x" * 17, "x" * 8 + "y" + "x" * 8, *map(str, range(100_000))]
    assert len(set(keys(column(texts)).tolist())) == len(texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("São Paulo — “quoted”, naïve, 中文, tab\tand\nline", set[str]()),
        ("a\ufffdb", {"replacement"}),
        ("bell\x07", {"control"}),
        ("del\x7f", {"control"}),
        ("next\x9dline", {"control"}),
        ("CafÃ©", {"mojibake"}),
        ("itâ€™s", {"mojibake"}),
        ("Â£5", {"mojibake"}),
        ("ï»¿bom", {"mojibake"}),
        ("e\u0301", {"unnormalised"}),
    ],
)
def test_defects_of_encoding_are_told_apart(text: str, expected: set[str]) -> None:
    found = encoding_defects(column(["before", text, "after"]))
    assert {name for name, mask in found.items() if mask[1]} == expected
    assert not any(mask[0] or mask[2] for mask in found.values())


@pytest.mark.parametrize("parts", [1, 7])
def test_later_rows_of_a_repeated_key_are_found_with_the_row_they_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    values = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint64)
    values.tofile(tmp_path / "keys")
    monkeypatch.setattr(corpus, "_MERGED", -(-len(values) // parts))
    count, first = repeated(tmp_path / "keys")
    last: dict[int, int] = {}
    expected: list[tuple[int, int]] = []
    for row, value in enumerate(values.tolist()):
        if value and value in last:
            expected.append((row, last[value]))
        last[value] = row
    assert (count, first) == (len(expected), expected[: corpus.EXAMPLES])


def test_a_corpus_is_counted_and_its_defects_named(tmp_path: Path) -> None:
    rows = [("a", "A\nred"), ("b", "B\nblue \ufffd"), ("c", "no title"), ("d", "a\nRED!"), ("e", "E\n" + "x" * 50)]
    found = measured(write(tmp_path / "c.jsonl", rows), ids=("b", "z"), max_chars=40)
    assert found.rows == 5 and found.longest == 52
    assert {name: count for name, count in found.defects.items() if count} == {
        "replacement": 1, "untitled": 1, "overlong": 1, "repeated_contents": 1,
    }  # fmt: skip
    assert found.examples["repeated_contents"] == [{"line": 4, "id": "d", "text": "repeats line 1: a RED!"}]
    assert found.examples["overlong"] == [{"line": 5, "id": "e", "text": "E " + "x" * 50}]
    assert found.known.sum() == 1 and not list((tmp_path / "scratch").iterdir())


def test_torn_lines_are_counted_among_good_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [("a", "A\nred"), ("b", "B\nblue"), ("b", "C\ngreen")])
    good = path.read_bytes().splitlines()
    bad = [b'{"id": "x", "cont', b"", b'{"id": "x"}', b'{"id": 7, "contents": "x"}', b'{"id": "x", "contents": " "}', b"[]"]
    bad.append(b'{"id": "\xff", "contents": "x"}')
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    found = measured(path)
    assert found.rows == 10 and found.defects["malformed"] == len(bad) and found.defects["repeated_ids"] == 1
    assert [item["line"] for item in found.examples["malformed"]] == [2, 3, 4, 5, 6]
    assert found.examples["repeated_ids"] == [{"line": 10, "id": "b", "text": "repeats line 9: C green"}]


def test_the_result_depends_neither_on_shards_nor_on_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(str(n % 990), f"T\ntext {n} of {'é' if n % 7 else 'e'}" + " more" * (n % 5)) for n in range(1000)]
    path = write(tmp_path / "c.jsonl", rows)
    whole = measured(path, ("text 77", "text 1000"))
    monkeypatch.setattr(corpus, "SHARD_BYTES", 9000)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 500)
    cut = measured(path, ("text 77", "text 1000"))
    assert len(cut.shards) > 5 and sum(shard["rows"] for shard in cut.shards) == 1000
    for name in ("rows", "longest", "defects", "examples", "sample"):
        assert getattr(whole, name) == getattr(cut, name), name
    for name in ("chars", "words", "present", "known"):
        assert (getattr(whole, name) == getattr(cut, name)).all(), name
    assert whole.defects["repeated_ids"] == 10 and whole.present.sum() == 1
    lengths = Counter(len(text) for _, text in rows)
    assert {size: int(count) for size, count in enumerate(cut.chars) if count} == lengths


def test_the_sample_is_bounded_and_drawn_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SAMPLE_ROWS", 10)
    sample = measured(write(tmp_path / "c.jsonl", [(str(row), f"T\ntext {row}") for row in range(500)])).sample
    assert len(sample) == 10 and {int(name) // 250 for _, name, _ in sample} == {0, 1}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("Paris",), True),
        (("Lyon’s",), False),
        (("capital is: PARIS",), True),
        (("capital of Paris",), False),
        (("it Rhone",), False),
        (("Rom",), False),
        (("yes",), True),
        (("Saint Paul", "Lyon"), True),
        (("?!",), False),
        (("Its capital is Paris and no other town",), False),
        (("France its capital is Paris and also it: the rest is not sought",), True),
    ],
    ids=["word", "none", "punctuation", "order", "across", "part", "yes", "alias", "nothing", "long", "head"],
)
def test_an_answer_is_found_where_its_words_stand_side_by_side(tmp_path: Path, answers: tuple[str, ...], expected: bool) -> None:
    rows = [("s", "France\nIts capital is Paris, and also it"), ("t", "Rhone\nIt flows by Lyon—the Romance of it.")]
    sought = Sought.of(answers, ())
    found = measure_corpus(write(tmp_path / "c.jsonl", rows), sought, 1000, tmp_path, lambda rows: None)
    assert sought.answered(answers, found.present) is expected


IN_OTHER_SCRIPTS = {
    "Chinese": ("长江\n长江流经武汉和南京，最后流入东海。", ["武汉", "流经武汉和南京最后流入", "东海 "], ["北京", "汉武", "武汉最后"]),
    "Japanese": ("富士山\n富士山は静岡県とヤマナシ県にまたがる。", ["静岡県", "ﾔﾏﾅｼ県", "またがる。"], ["岡静", "ヤマクチ", "しずおか"]),
    "Thai": ("กรุงเทพ\nกรุงเทพตั้งอยู่ริมแม่น้ำเจ้าพระยาในภาคกลาง", ["แม่น้ำเจ้าพระยา", "ริมแม่น้ำ"], ["แม่น้ำโขง", "เจาพระยา", "พระยาเจ้า"]),
    "Arabic": ("القاهرة\nتقعُ القاهرةُ على نهر النيل، وهي مدينة.", ["نهر النيل", "نَهْر النِّيل", "وهي مدينـــة"], ["النيل نهر", "قاهرة"]),
    "Hindi": ("दिल्ली\nदिल्ली यमुना नदी के किनारे बसी है।", ["यमुना नदी", "दिल्ली यमुना", "बसी है"], ["नदी यमुना", "यमन", "दल", "दिल"]),
}  # fmt: skip


@pytest.mark.parametrize("script", IN_OTHER_SCRIPTS)
def test_an_answer_in_another_script_is_found_where_it_stands_and_nowhere_else(script: str, tmp_path: Path) -> None:
    """Words over 16 bytes were once told apart by their ends alone, and of unsegmented text no part was found."""
    text, present, absent = IN_OTHER_SCRIPTS[script]
    sought = Sought.of([*present, *absent], ())
    rows = [("s", text), ("t", "Title\nNothing of it: " + " ".join(absent[0][::-1]))]
    found = measure_corpus(write(tmp_path / "c.jsonl", rows), sought, 1000, tmp_path, lambda rows: None)
    answered = {answer for answer in [*present, *absent] if sought.answered([answer], found.present)}
    assert answered == set(present)


@pytest.mark.parametrize("script", IN_OTHER_SCRIPTS)
def test_passages_that_differ_in_one_letter_of_another_script_are_no_repeats(script: str, tmp_path: Path) -> None:
    text = IN_OTHER_SCRIPTS[script][0]
    middle = next(place for place in range(len(text) // 2, len(text)) if text[place].isalpha() and text[place] != text[0])
    changed = text[:middle] + text[0] + text[middle + 1 :]
    rows = [("a", text), ("b", changed), ("c", f"{text}!")]
    found = measured(write(tmp_path / "c.jsonl", rows))
    assert text != changed and found.defects["repeated_contents"] == 1
    assert [item["line"] for item in found.examples["repeated_contents"]] == [3]
