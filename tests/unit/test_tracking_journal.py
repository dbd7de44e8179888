"""The journal keeps what was said whole and in order, and names what MLflow may be told."""

from __future__ import annotations

import threading
from pathlib import Path

from tasks.tracking.journal import EVENTS, Journal, Place, read
from tasks.tracking.sender import _groups, metric_name
from tasks.tracking.traces import pieces
from tasks.tracking.track import flat


def test_events_come_back_in_order_from_any_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(5):
        journal.write("metrics", key="train", step=number, values={"reward": number / 10})
    events = read(tmp_path, 0)
    assert [event["step"] for _, event in events] == [0, 1, 2, 3, 4]
    assert [event["step"] for _, event in read(tmp_path, events[2][0])] == [3, 4]


def test_a_line_cut_by_a_crash_is_not_read_until_it_is_whole(tmp_path: Path) -> None:
    Journal(tmp_path).write("end", key="a")
    with (tmp_path / EVENTS).open("ab") as stream:
        stream.write(b'{"op": "end", "key": "b"')
    assert [event["key"] for _, event in read(tmp_path, 0)] == ["a"]


def test_threads_never_mix_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    threads = [threading.Thread(target=lambda name=name: [journal.write("tags", key=name * 200) for _ in range(50)]) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(tmp_path, 0)) == 200


def test_the_senders_place_survives(tmp_path: Path) -> None:
    place = Place(offset=7, uri="sqlite:///x", experiment="1", runs={"flow": "abc"})
    place.save(tmp_path)
    assert Place.load(tmp_path) == place
    assert Place.load(tmp_path / "none") == Place()


def test_neighbouring_metrics_of_one_run_go_out_together() -> None:
    events = [{"op": op, "key": key} for op, key in (("metrics", "a"), ("metrics", "a"), ("metrics", "b"), ("tags", "b"), ("tags", "b"))]
    groups = [[event["key"] for _, event in group] for group in _groups(list(enumerate(events)))]
    assert groups == [["a", "a"], ["b"], ["b"], ["b"]]


def test_names_fit_mlflow() -> None:
    assert metric_name("response_length/clip_ratio@1(%)") == "response_length/clip_ratio_1___"


def test_parameters_are_flattened_and_cut() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": "x" * 600}) == {"a.b": "1", "a.c": "{}", "d": "x" * 500}


def test_an_episode_becomes_spans_in_order() -> None:
    record = {
        "segments": [
            {"author": "model", "text": "<think> who? </think><search> the author </search>", "tokens": 6},
            {"author": "search", "text": "<result> She wrote. </result>", "tokens": 5},
            {"author": "model", "text": "<think> so </think><answer> She </answer>", "tokens": 2},
        ],
        "searches": [{"query": "the author", "passage_ids": ["1"], "seconds": 0.25, "error": None}],
        "engine_seconds": 8.0,
    }
    found = list(pieces(record))
    assert [kind for kind, *_ in found] == ["think", "search", "retrieve", "think", "answer"]
    assert found[2] == ("retrieve", "the author", "<result> She wrote. </result>", 0.25)
    assert sum(seconds for *_, seconds in found) == 8.25


def test_text_without_tags_and_a_cut_answer_are_kept() -> None:
    record = {
        "segments": [{"author": "model", "text": "hm", "tokens": 1}, {"author": "model", "text": "<answer> cut", "tokens": 1}],
        "searches": [],
    }
    assert [(kind, text) for kind, _, text, _ in pieces(record)] == [("think", "hm"), ("answer", "cut")]
