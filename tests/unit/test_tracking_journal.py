"""The journal keeps what was said whole and in order, and names what MLflow may be told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from research_rl import config
from research_rl.config.redact import redact
from research_rl.errors import ConfigError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.manifest import Manifest
from tasks.tracking.journal import EVENTS, PLACE, Place, TrackingJournal, read
from tasks.tracking.sender import _groups, metric_name
from tasks.tracking.traces import TraceSpan, documents, pieces
from tasks.tracking.track import Tracker, changed, flat, run_name, run_title


def test_events_come_back_in_order_from_any_place(tmp_path: Path) -> None:
    journal = TrackingJournal(tmp_path)
    for number in range(5):
        assert journal.write("metrics", key="train", step=number, values={"reward": number / 10})
    events = read(tmp_path, 0)
    assert [event["step"] for _, event in events] == [0, 1, 2, 3, 4]
    assert [event["step"] for _, event in read(tmp_path, events[2][0])] == [3, 4]


def test_a_line_cut_by_a_crash_is_never_read_and_the_next_event_stands_on_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TrackingJournal(tmp_path).write("end", key="a", status="FINISHED")
    with (tmp_path / EVENTS).open("ab") as stream:
        stream.write(b'{"op": "end", "key": "b"')
    assert [event["key"] for _, event in read(tmp_path, 0)] == ["a"]
    assert TrackingJournal(tmp_path).write("end", key="c", status="FINISHED")
    assert [event["key"] for _, event in read(tmp_path, 0)] == ["a", "c"]
    assert "24 bytes of an unfinished line, which are cut off" in caplog.text


def test_a_glued_line_and_a_line_that_is_no_event_cost_themselves_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = TrackingJournal(tmp_path)
    journal.write("end", key="a", status="FINISHED")
    with (tmp_path / EVENTS).open("ab") as stream:
        stream.write(b'{"op": "me{"op": "end", "time": 1}\n[1, 2]\n{"op": "metrics", "time": 1, "key": "a"}\n')
    journal.write("end", key="b", status="FINISHED")
    assert [event["key"] for _, event in read(tmp_path, 0)] == ["a", "b"]
    assert "is not JSON and is passed over" in caplog.text and caplog.text.count("is no event of this version") == 2


def test_a_disk_that_fills_up_in_the_middle_of_an_event_costs_that_event_only(tmp_path: Path) -> None:
    # A limit on the size of files makes the kernel take the first part of a line and refuse the rest, as a full disk does.
    code = f"""if True:
        import resource, signal, sys
        from pathlib import Path
        from tasks.tracking.journal import TrackingJournal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal = TrackingJournal(Path({str(tmp_path)!r}))
        took = [journal.write("end", key="before", status="FINISHED")]
        size = (journal.folder / "events.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        took += [journal.write("end", key="lost", status="FINISHED"), journal.write("end", key="lost too", status="FINISHED")]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        took.append(journal.write("end", key="after", status="FINISHED"))
        print(took, journal.lost)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False, False, True] 2\n"
    assert done.stderr.count("takes no tracking event: File too large; free disk space") == 1
    assert [event["key"] for _, event in read(tmp_path, 0)] == ["before", "after"]
    assert len((tmp_path / EVENTS).read_bytes().splitlines()) == 2


def test_threads_never_mix_lines(tmp_path: Path) -> None:
    journal = TrackingJournal(tmp_path)

    def tell(name: str) -> None:
        for _ in range(50):
            journal.write("tags", key=name * 200, values={})

    threads = [threading.Thread(target=tell, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(tmp_path, 0)) == 200


def test_no_event_holds_credentials(tmp_path: Path) -> None:
    journal = TrackingJournal(tmp_path)
    addresses = [
        "https://ann:pass@host/data?X-Amz-Signature=0f1e&part=2",
        "postgresql://u:p%40ss@db/mlflow",
        "https://t0ken@host/?api_key=s3cret",
    ]
    journal.write(
        "open",
        name="n",
        experiment="e",
        artifacts="/a",
        uri=addresses[1],
        tags={"error": f"no reply: {addresses[2]}"},
        params={"u": addresses},
    )
    Place(uri=addresses[1], failure=addresses[0]).save(tmp_path)
    written = (tmp_path / EVENTS).read_text() + (tmp_path / PLACE).read_text()
    assert not [secret for secret in ("ann", "pass", "0f1e", "p%40ss", "t0ken", "s3cret") if secret in written]
    assert "https://***@host/data?X-Amz-Signature=***&part=2" in written


@pytest.mark.parametrize(
    "text", ["https://en.wikipedia.org/w/index.php?title=Key&oldid=7", "a@b.org", "see http://h/x, or ask c@d.org", "s3://bucket/key"]
)
def test_an_address_without_credentials_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_parameters_and_errors_are_redacted_before_they_are_cut() -> None:
    assert flat({"url": "https://ann:" + "x" * 600 + "@host/file"}) == {"url": "https://***@host/file"}


def manifest(stage: str) -> Manifest:
    return Manifest(stage=stage, config_hash="c", parents={}, code_version="0", counts={}, facts={}, files=())


def test_two_stages_that_end_at_one_moment_are_both_remembered(tmp_path: Path) -> None:
    names = [f"stage{number}" for number in range(16)]
    tracker = Tracker(TrackingJournal(tmp_path / "run"), None, "sqlite:///none")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: tracker.remember(manifest(name)), names))
    assert all(tracker.journal_of(manifest(name)) == tmp_path / "run" for name in names)


@pytest.mark.parametrize("damage", ['{"train:0": "ru', "[1]", "", "null"])
def test_a_damaged_note_of_what_was_reported_costs_a_second_report_not_the_run(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that filled up left half a file, and every later run ended in a traceback at its first stage."""
    tracker = Tracker(TrackingJournal(tmp_path / "run"), None, "sqlite:///none")
    (tmp_path / "reported.json").write_text(damage)
    assert tracker.journal_of(manifest("one")) is None
    assert "artifacts are reported once more, and the file is written anew" in caplog.text
    tracker.remember(manifest("one"))
    assert tracker.journal_of(manifest("one")) == tmp_path / "run"


def test_a_run_is_named_by_what_it_is_and_says_what_was_changed() -> None:
    resolved = config.load_profile("laptop", ["train.steps=26", "seed=7"])
    assert run_name("research-train", resolved) == "research-train laptop seed 7"
    assert run_title("research-train", resolved) == f"train laptop steps={resolved.train.steps} seed=7"
    assert run_title("research-data", resolved) == "data laptop seed=7"
    assert changed(resolved) == "seed=7, train.steps=26"
    assert changed(config.load_profile("laptop")) == "nothing"


@pytest.mark.parametrize("name", ["team/x", "Tom's model", "a:b", " x", ".."])
def test_a_model_name_that_cannot_be_registered_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match="use letters, digits, spaces"):
        config.load_profile("laptop", [f"tracking.registered_model={json.dumps(name)}"])


def test_the_senders_place_survives(tmp_path: Path) -> None:
    place = Place(offset=7, uri="sqlite:///x", experiment="1", runs={"flow": "abc"})
    place.save(tmp_path)
    assert Place.load(tmp_path) == place
    assert Place.load(tmp_path / "none") == Place()


@pytest.mark.parametrize("content", ["", "[1]", '{"offset": 3, "unknown": 1}'])
def test_a_damaged_place_starts_the_journal_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / PLACE).write_text(content)
    assert Place.load(tmp_path) == Place(doubted=True)


def test_metrics_and_tags_of_one_run_go_out_together_after_the_files() -> None:
    kinds = (("metrics", "a"), ("tags", "b"), ("metrics", "b"), ("artifact", "a"), ("metrics", "a"), ("tags", "b"), ("artifact", "a"))
    groups = [[(event["op"], event["key"]) for event in group] for group in _groups([{"op": op, "key": key} for op, key in kinds])]
    assert groups == [[("artifact", "a")], [("artifact", "a")], [("metrics", "a")] * 2, [("metrics", "b")], [("tags", "b")] * 2]


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
    spans = list(pieces(record))
    assert [span.kind for span in spans] == ["think", "search", "retrieve", "think", "answer"]
    assert spans[2] == TraceSpan("retrieve", "the author", "<result> She wrote. </result>", 0.25, passage_ids=("1",))
    assert sum(span.seconds for span in spans) == 8.25


def test_text_without_tags_and_a_cut_answer_are_kept() -> None:
    record = {
        "segments": [{"author": "model", "text": "hm", "tokens": 1}, {"author": "model", "text": "<answer> cut", "tokens": 1}],
        "searches": [],
    }
    assert [(span.kind, span.text) for span in pieces(record)] == [("think", "hm"), ("answer", "cut")]


def test_a_result_becomes_a_document_a_passage() -> None:
    block = " <result>\nOne\nfirst\n\nTwo\nsecond\n</result>"
    assert [(found["id"], found["page_content"]) for found in documents(block, ("a", "b"))] == [("a", "One\nfirst"), ("b", "Two\nsecond")]
    assert [found["id"] for found in documents(block, ("a", "b", "c"))] == ["a", "b"], "the limit on tokens cut the last passage off"
    (whole,) = documents(block, ("a",))
    assert whole["page_content"] == "One\nfirst\n\nTwo\nsecond", "a passage with an empty line of its own is not taken apart"
    assert documents(" <result>\nno passage was found\n</result>", ()) == []


def test_a_turn_reads_all_that_stands_before_it() -> None:
    record = {
        "prompt_tokens": 10,
        "segments": [
            {"author": "model", "text": "<think>a</think><search>b</search>", "tokens": 4},
            {"author": "search", "text": " <result>\nc\n</result>", "tokens": 3},
            {"author": "model", "text": "<answer>d</answer>", "tokens": 2},
        ],
        "searches": [{"query": "b", "passage_ids": ["1"], "seconds": 0.1, "error": None}],
    }
    assert [span.tokens for span in pieces(record)] == [(10, 4), (0, 0), (0, 0), (17, 2)]
