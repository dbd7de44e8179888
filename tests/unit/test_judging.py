"""A judge over saved predictions: the published protocol to the constant, every failure counted once, and nothing asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research_rl import config as configuration
from research_rl.cli import main
from research_rl.config import Config
from research_rl.errors import ConfigError, DataError, ManifestError, ServiceError
from research_rl.evaluation import judging
from research_rl.evaluation.judge_metrics import agreement, stability
from research_rl.evaluation.judge_presets import ATTEMPTS, PRESETS, WAIT_S, Case, find
from research_rl.evaluation.judging import Judged, Judgement, Protocol, judge, read_verdicts
from research_rl.evaluation.results import Result, read_results, write_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from research_rl.process import tracked
from research_rl.report.judging import describe
from tests.judge_server import JudgeServer, running
from tests.results import lost, played

RESEARCH = Protocol(PRESETS["research"], "m")
STRICT = Protocol(PRESETS["strict"], "m")
BROWSECOMP = Protocol(PRESETS["browsecomp"], "m")


class Bench:
    """A workspace, an evaluation in it, and a judge."""

    def __init__(self, root: Path, server: JudgeServer) -> None:
        self.root, self.server, self.workspace = root, server, Workspace(root)
        self.evaluation = root / "artifacts" / "evaluation"

    def save(self, *results: Result, stage: str = "evaluate") -> None:
        with manifest.publish(self.evaluation, stage, "x", {}) as staging:
            write_results(staging.path, results)

    def config(self, *overrides: str) -> Config:
        return configuration.load_profile("laptop", [f"judge.url={self.server.url}", "judge.concurrency=8", *overrides])

    def judge(self, protocol: Protocol = RESEARCH, *overrides: str, again: bool = False) -> Judgement:
        return judge(self.config(*overrides), self.workspace, self.evaluation, protocol, silent, again=again)

    @property
    def published(self) -> list[Path]:
        folder = self.root / "artifacts" / "judgements"
        return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with running() as server:
        yield Bench(tmp_path, server)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the second between two tries."""
    monkeypatch.setattr(judging, "WAIT_S", 0.01)


def answered(count: int, answer: str = "Paris") -> list[Result]:
    return [played(row, answer, golds=["Paris"]) for row in range(count)]


def metrics(judgement: Judgement) -> dict[str, Any]:
    return json.loads((judgement.folder / "metrics.json").read_text())


def by_row(judgement: Judgement) -> dict[int, Judged]:
    found = read_verdicts(judgement.folder)
    assert len({item.row for item in found}) == len(found), "a question stands in the verdicts twice"
    return {item.row: item for item in found}


def test_the_published_judge_is_asked_to_the_constant(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_JUDGE_TOKEN", "secret")
    bench.save(played(0, "Pariis", golds=["Paris", "l'été"]), replace(played(1, "x"), prediction=""))
    verdicts = by_row(bench.judge(RESEARCH, "judge.max_tokens=9", "judge.attempts=1"))
    assert verdicts[0].correct is True and verdicts[1].correct is False
    assert verdicts[0].rationale == "because" and verdicts[0].served == "served-1"
    asked = {number: (body, token) for number, _, body, token in bench.server.asked}
    assert set(asked) == {"0", "1"}, "an empty prediction is asked about like any other"
    body, token = asked["0"]
    messages = body.pop("messages")
    assert body == {"model": "m", "temperature": 0, "max_tokens": 1024, "response_format": {"type": "json_object"}}
    assert token == "Bearer secret" and [message["role"] for message in messages] == ["user"]
    text = messages[0]["content"]
    assert "Question: Question 0?\n" in text and "Predicted answer: Pariis\n" in text
    assert """Accepted answers: ['Paris', "l'été"]\n""" in text, "the list as Python writes it"
    assert text.index('"rationale"') < text.index('"judgement"')
    assert (ATTEMPTS, WAIT_S) == (5, 1.0)


@pytest.mark.parametrize(
    ("content", "correct"),
    [
        ('{"rationale": "r", "judgement": "correct"}', True),
        (' {"judgement": "correct", "rationale": "r"}\n', True),
        ('{"rationale": "r", "judgement": "incorrect"}', False),
        ('{"rationale": "r", "judgement": "Correct"}', False),
        ('{"rationale": "r", "judgement": "correct."}', False),
        ('{"rationale": ["r"], "judgement": null}', False),
        ('```json\n{"rationale": "r", "judgement": "correct"}\n```', None),
        ('{"judgement": "correct"}', None),
        ('{"rationale": "r"}', None),
        ('["rationale", "judgement"]', None),
        ('"rationale judgement"', None),
        ("", None),
        ("[" * 100_000, None),
        ("correct", None),
    ],
)
def test_the_published_verdict_is_the_exact_word_in_a_reply_that_is_json_as_a_whole(content: str, correct: bool | None) -> None:
    if correct is None:
        with pytest.raises(ValueError, match=r"JSON|lacks rationale or judgement"):
            find("research").read(content)
    else:
        assert find("research").read(content).correct is correct


FAULTS = ("500", "429", "400", "401", "cut", "html", "huge")
CONTENTS = ('{"judgement": "correct"}', '```json\n{"rationale": "", "judgement": "correct"}\n```', "", None, 7)


def test_every_way_to_fail_is_counted_once_and_only_failures_are_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_JUDGE_TOKEN", "secret")
    total = len(FAULTS) + len(CONTENTS) + 6
    bench.save(*answered(total))
    bench.server.faults = {str(number): fault for number, fault in enumerate(FAULTS)}
    bench.server.says = {str(len(FAULTS) + number): content for number, content in enumerate(CONTENTS)}
    failing = len(FAULTS) + len(CONTENTS)
    bench.server.says[str(failing)] = '{"rationale": "r", "judgement": "Correct"}'
    judgement = bench.judge(RESEARCH, "judge.timeout_s=120", f"judge.concurrency={total}")
    verdicts, found = by_row(judgement), metrics(judgement)
    assert [row for row, item in verdicts.items() if item.correct is None] == list(range(failing))
    assert [bool(item.error) for item in verdicts.values()] == [row < failing for row in range(total)]
    assert verdicts[failing].correct is False and verdicts[failing].said == "Correct"
    assert (found["n"], found["failed"]) == (total, failing)
    assert found["accuracy"]["n"] == total and found["accuracy"]["mean"] == pytest.approx(5 / total)
    assert found["published_accuracy"]["n"] == 6 and found["published_accuracy"]["mean"] == pytest.approx(5 / 6)
    assert "secret" not in json.dumps([item.error for item in verdicts.values()])
    assert {"HTTP 500", "HTTP 429", "HTTP 400", "HTTP 401"} <= {str(item.error)[:8] for item in verdicts.values()}
    times = {number: [at for one, at, *_ in bench.server.asked if one == number] for number in ("0", "2", "7")}
    assert [len(found) for found in times.values()] == [5, 1, 5], "what passes is tried five times, a refused request once"
    assert all(later - earlier >= 1 for earlier, later in zip(times["0"], times["0"][1:], strict=False))

    bench.server.take()
    bench.server.faults, bench.server.says = {}, {str(failing): "never asked about"}
    assert bench.judge().folder == judgement.folder and bench.server.take() == [], "a judgement that stands is read"
    assert bench.judge(again=True).folder == judgement.folder
    assert sorted(map(int, bench.server.take())) == list(range(failing)), "verdicts once given stand"
    after = by_row(judgement)
    assert len(after) == total and metrics(judgement)["failed"] == 0
    assert [after[row] for row in range(failing, total)] == [verdicts[row] for row in range(failing, total)]
    assert metrics(judgement)["accuracy"]["mean"] == metrics(judgement)["published_accuracy"]["mean"] == pytest.approx((total - 1) / total)
    assert bench.published == [judgement.folder], "and nothing unfinished is left"
    assert not list(bench.workspace.work(".").glob("judgement-*"))


def test_a_reply_that_does_not_end_costs_its_own_question_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that keep arriving end no wait of a client that limits each wait alone."""
    monkeypatch.setattr(judging, "ATTEMPTS", 1)
    bench.save(*answered(6))
    bench.server.faults = {"0": "hang", "1": "drip"}
    verdicts = by_row(bench.judge(RESEARCH, "judge.timeout_s=5"))
    assert [item.correct for item in verdicts.values()] == [None, None, True, True, True, True]
    assert {verdicts[row].error for row in (0, 1)} == {f"no whole reply within 5 s from {bench.server.url}"}


@pytest.mark.parametrize("fault", ["500", "401", "404", "400", "cut"])
def test_a_judge_that_is_down_is_one_message_and_leaves_nothing(bench: Bench, impatient: None, fault: str) -> None:
    bench.save(*answered(40))
    bench.server.faults = {"*": fault}
    with pytest.raises(ServiceError, match=r"the judge gives no answer, \d+ questions in a row had none: .*the 0 of 40 verdicts") as error:
        bench.judge()
    assert str(error.value).count("\n") == 0 and {"500": "start the judge", "cut": "start the judge"}.get(fault, "") in str(error.value)
    assert len(set(bench.server.take())) < 40, "the run goes on though the judge is down"
    assert bench.published == [] and not list(bench.workspace.work(".").glob("judgement-*"))


def test_nobody_at_the_address_is_a_judge_that_is_down(bench: Bench, impatient: None) -> None:
    bench.save(*answered(3))
    with pytest.raises(ServiceError, match=r"3 questions in a row had none: ConnectError from http://127\.0\.0\.1:9/v1; start the judge"):
        bench.judge(RESEARCH, "judge.url=http://127.0.0.1:9/v1")
    assert bench.published == []


def test_without_a_judge_nothing_is_asked(bench: Bench) -> None:
    bench.save(*answered(1))
    with pytest.raises(ConfigError, match=r"no judge: set judge\.url, or name with --url"):
        bench.judge(RESEARCH, "judge.url=null")
    assert bench.published == []


def test_a_judge_that_goes_away_keeps_its_verdicts_and_the_next_run_asks_for_the_rest(bench: Bench, impatient: None) -> None:
    bench.save(*answered(60))
    bench.server.faults = {str(number): "500" for number in range(20, 60)}
    with pytest.raises(ServiceError, match=r"10 questions in a row had none: HTTP 500 .* the 20 of 60 verdicts that came are kept"):
        bench.judge()
    assert bench.published == []
    bench.server.take()
    bench.server.faults = {}
    judgement = bench.judge()
    assert sorted(map(int, bench.server.take())) == list(range(20, 60)) and len(by_row(judgement)) == 60


def test_a_few_questions_that_always_fail_do_not_withhold_the_others_verdicts(bench: Bench, impatient: None) -> None:
    """They may be what a resumed run has left to ask."""
    bench.save(*answered(30))
    bench.server.faults = {str(number): "500" for number in range(15, 30)}
    with pytest.raises(ServiceError):
        bench.judge()
    bench.server.faults = {str(number): "400" for number in range(28, 30)}
    first = metrics(bench.judge())
    assert first["failed"] == 2 and first["accuracy"]["mean"] == pytest.approx(28 / 30)
    with pytest.raises(ServiceError, match="the 28 of 30 verdicts"):
        bench.judge(again=True)
    assert metrics(bench.judge()) == first


def test_a_killed_judgement_asks_only_for_what_it_had_in_flight(bench: Bench) -> None:
    bench.save(*answered(12))
    configuration.update(bench.config("judge.concurrency=1", "reward.judge.model=m"), bench.root / "params.yaml")
    bench.server.slowness = 0.3
    command = [sys.executable, "-m", "research_rl", "judge", "-w", str(bench.root), str(bench.evaluation)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(bench.server.asked) < 5:
        assert process.poll() is None, process.communicate()[0].decode()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = bench.server.take()
    assert before == ["0", "1", "2", "3", "4"] and bench.published == []
    bench.server.slowness = 0.0
    (journal,) = bench.workspace.work(".").glob("judgement-*/verdicts.jsonl")
    with journal.open("ab") as stream:
        stream.write(b'{"row": 4, "id": "q4", "corr')  # what a kill in the middle of a write leaves
    judgement = bench.judge(RESEARCH, "judge.concurrency=1")
    assert bench.server.take() == [str(number) for number in range(4, 12)], "four verdicts had come"
    assert len(by_row(judgement)) == 12 and metrics(judgement)["accuracy"]["mean"] == 1.0


def test_whatever_decides_a_verdict_is_in_the_hash(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(*answered(1))
    research = PRESETS["research"]
    reworded = replace(
        research, messages=lambda case: [{**message, "content": message["content"] + " "} for message in research.messages(case)]
    )
    protocols = [RESEARCH, STRICT, BROWSECOMP, replace(RESEARCH, model="n"), replace(RESEARCH, swapped=True)]
    protocols += [Protocol(reworded, "m"), Protocol(replace(research, decoding={**research.decoding, "max_tokens": 1025}), "m")]
    folders = {bench.judge(protocol).folder for protocol in protocols}
    bench.save(*answered(1, "Rome"))
    folders.add(bench.judge(RESEARCH).folder)
    assert len(folders) == len(bench.published) == 8, "one judgement took another's place"
    standing = bench.judge(RESEARCH, "judge.timeout_s=3", "judge.concurrency=2", "judge.max_tokens=99")
    assert standing.folder in folders, "what changes no verdict is in the hash"
    content = manifest.load(standing.folder)
    assert content.stage == "judgement" and content.config_hash == standing.hash
    assert content.parents == {"evaluate": manifest.load(bench.evaluation).hash}
    assert content.parameters["prompt"] == research.prompt_hash(swapped=False) != research.prompt_hash(swapped=True)


def test_a_torn_judgement_is_asked_for_again(bench: Bench) -> None:
    bench.save(*answered(2))
    judgement = bench.judge()
    with (judgement.folder / "verdicts.jsonl").open("a") as stream:
        stream.write("{}\n")
    bench.server.take()
    assert len(by_row(bench.judge())) == 2 and sorted(bench.server.take()) == ["0", "1"]


@pytest.mark.parametrize("stage", ["prepare", "judgement"])
def test_only_whole_evaluations_are_judged(bench: Bench, stage: str) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        bench.judge()
    bench.save(*answered(1), stage=stage)
    with pytest.raises(DataError, match=f"is the artifact of stage {stage}; name an artifact of baseline, evaluate, cell or night"):
        bench.judge()


def test_strict_keeps_data_apart_cuts_it_and_calls_a_blank_answer_wrong_unasked(bench: Bench) -> None:
    blank, long = replace(played(1, "x"), prediction=" \n"), replace(played(2, "x"), prediction="P" * 5000)
    bench.save(played(0, "Paris", golds=["Paris"]), blank, long)
    verdicts = by_row(bench.judge(STRICT))
    assert [verdicts[row].correct for row in range(3)] == [True, False, True], "a code fence or a brace hides no verdict"
    assert verdicts[0].rationale == "a {brace}" and (verdicts[1].asked, verdicts[1].said) == (False, "blank")
    asked = {number: body["messages"] for number, _, body, _ in bench.server.asked}
    assert set(asked) == {"0", "2"}, "an exact match is asked about: it tells whether the judge can be trusted"
    assert [message["role"] for message in asked["0"]] == ["system", "user"]
    assert json.loads(asked["0"][1]["content"]) == {"question": "Question 0?", "accepted": ["Paris"], "candidate": "Paris"}
    assert len(json.loads(asked["2"][1]["content"])["candidate"]) == 2000
    assert verdicts[2].prediction == "P" * 5000


@pytest.mark.parametrize(
    ("reply", "correct", "confidence"),
    [
        ('{"extracted_final_answer": "P", "reasoning": "r", "correct": "yes", "confidence": 80}', True, 80),
        ('<think>{"correct": "no"}</think> {"correct": "Yes", "confidence": "35%"}', True, 35),
        ('{"correct": "no"}', False, None),
        ('{"correct": "no", "confidence": 1e999}', False, None),
        ('{"correct": "no", "confidence": "high"}', False, None),
        ('{"correct": "no", "confidence": -3}', False, None),
        ('{"correct": "no", "confidence": null}', False, None),
        ('{"correct": "no", "confidence": 100}', False, 100),
    ],
)
def test_browsecomp_reads_verdict_and_confidence(reply: str, correct: bool, confidence: float | None) -> None:
    opinion = find("browsecomp").read(reply)
    assert (opinion.correct, opinion.confidence) == (correct, confidence)


@pytest.mark.parametrize("reply", ["correct: yes", '{"correct": "maybe"}', '{"correct": ' + "[" * 900 + "]" * 900 + "}", "{" * 50_000])
def test_browsecomp_refuses_a_reply_without_a_verdict(reply: str) -> None:
    with pytest.raises(ValueError, match=r"has no verdict|nested"):
        find("browsecomp").read(reply)


def test_calibration_is_of_stated_confidences_and_the_others_are_counted(bench: Bench) -> None:
    bench.server.says |= {number: '{"correct": "no", "confidence": null}' for number in ("4", "5")}
    bench.save(*answered(3), *(played(row, "Rome", golds=["Paris"]) for row in range(3, 6)))
    judgement = bench.judge(BROWSECOMP)
    found = metrics(judgement)
    # Of four with 80 %, three are right: error 0.05; Brier (3 * 0.04 + 0.64) / 4. Taken for 100 % the other two would count, too.
    assert found["calibration"]["n"] == 4 and found["unstated"] == 2
    assert found["calibration"]["expected_error"] == pytest.approx(0.05) and found["calibration"]["brier"] == pytest.approx(0.19)
    table = describe([judgement])
    assert "| stated | not stated | expected calibration error | calibration error (RMS) | Brier score |" in table
    assert "| 4 | 2 | 0.050 | 0.050 | 0.190 |" in table


def test_browsecomp_measures_calibration(bench: Bench) -> None:
    bench.save(*answered(4), *(played(row, "Rome", golds=["Paris"]) for row in range(4, 8)))
    found = metrics(bench.judge(BROWSECOMP))
    assert found["calibration"]["brier"] == pytest.approx((0.2**2 + 0.8**2) / 2) and found["accuracy"]["mean"] == 0.5
    body = bench.server.asked[0][2]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "max_tokens")} == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "max_tokens": 4096,
    }


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_swapped_prompt_holds_the_same_in_another_order(preset: Any) -> None:
    shown = [preset.messages(Case("q?", ("first", "second"), "guess", swapped))[-1]["content"] for swapped in (False, True)]
    order = [sorted(("first", "second", "guess"), key=text.rindex) for text in shown]
    assert order == [["first", "second", "guess"], ["guess", "second", "first"]]
    assert sorted(shown[0]) == sorted(shown[1]), "nothing else changes"


def test_a_swapped_judgement_shows_which_verdicts_stay(bench: Bench) -> None:
    bench.save(*answered(4))
    plain = bench.judge()
    bench.server.says = {"3": '{"rationale": "", "judgement": "incorrect"}', "2": ""}
    swapped = bench.judge(replace(RESEARCH, swapped=True), "judge.attempts=1")
    found = stability(*(read_verdicts(item.folder) for item in (plain, swapped)), 100, 1)
    assert (found["stay"]["n"], found["to_right"], found["to_wrong"]) == (3, 0, 1) and found["stay"]["mean"] == pytest.approx(2 / 3)
    assert metrics(plain)["accuracy"]["mean"] == 1.0, "the swapped verdicts are no part of the rate"
    assert "| evaluation, research, m | 3 | 0.667 (" in describe([plain, swapped])


def verdicts_of(table: Sequence[tuple[bool | None, float, int]]) -> list[Judged]:
    made = [(correct, em) for correct, em, count in table for _ in range(count)]
    return [Judged.of(replace(played(row, "x"), em=em), correct=correct) for row, (correct, em) in enumerate(made)]


def test_agreement_with_exact_match_by_hand() -> None:
    found = agreement(verdicts_of([(True, 1.0, 20), (True, 0.0, 10), (False, 1.0, 5), (False, 0.0, 15)]))
    assert list(found.values())[:4] == [20, 10, 5, 15]
    # Cohen's kappa: (0.7 - 0.5) / (1 - 0.5), chance 0.6 * 0.5 + 0.4 * 0.5.
    assert found["share"] == pytest.approx(0.7) and found["kappa"] == pytest.approx(0.4)
    assert agreement([])["share"] is None and agreement(verdicts_of([(True, 1.0, 3)]))["kappa"] is None


def test_lost_questions_count_and_data_sets_have_rows_of_their_own(bench: Bench) -> None:
    bench.save(played(0, "Paris", golds=["Paris"], source="one"), played(1, "Rome", source="two"), lost(2, source="two"))
    judgement = bench.judge()
    assert manifest.load(judgement.folder).counts == {"questions": 3, "failed": 0, "lost": 1}
    table = [line for line in describe([judgement]).splitlines() if line.startswith("| evaluation, research, m |")]
    assert [line.split(" | ")[1:5] for line in table[:3]] == [["all", "3", "0", "1"], ["one", "1", "0", "0"], ["two", "2", "0", "1"]]


def test_text_that_nobody_vouches_for_reaches_no_terminal_and_breaks_no_table(bench: Bench) -> None:
    bad = "\x1b]0;title\x07 <script>alert(1)</script> | \u202e \ud800 " + "long " * 200
    result = replace(played(0, "Rome", golds=["Paris"]), prediction=bad, golden_answers=(bad,), question=f"Question 0? {bad}")
    bench.save(result)
    assert read_results(bench.evaluation)[0].prediction == bad
    bench.server.says = {"0": json.dumps({"rationale": bad, "judgement": "correct"})}
    judgement = bench.judge()
    assert by_row(judgement)[0].rationale == bad, "what is kept is what was said"
    shown = describe([judgement])
    assert "<script" not in shown and shown.encode() and not {"\x1b", "\x07", "\u202e"} & set(shown)
    (row,) = [line for line in shown.splitlines() if "| Question 0?" in line]
    assert row.replace("\\|", "").count("|") == 8 and len(row) < 4 * 700


@pytest.mark.parametrize("error", [None, ConfigError("a run of the workspace sends"), ServiceError("MLflow takes no verdicts now")])
def test_mlflow_is_told_after_the_table_and_costs_nothing_when_it_is_silent(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    told: list[tuple[Path, str]] = []

    def judged(workspace: Path) -> int:
        told.append((workspace, capsys.readouterr().out))
        if error:
            raise error
        return 1

    monkeypatch.setattr(tracked, "judged", judged)
    bench.save(*answered(1))
    assert main(["init", "-w", str(bench.root)]) == 0
    capsys.readouterr()
    assert main(["judge", "-w", str(bench.root), str(bench.evaluation), "--model", "m", "--url", bench.server.url]) == 0
    [(workspace, printed)] = told
    assert workspace == bench.root and "| evaluation, research, m | all | 1 |" in printed and len(bench.published) == 1
    said = capsys.readouterr().err
    assert (f"the verdicts stand; MLflow gets them later: {error}" in said) == (error is not None)


def test_the_command_prints_a_table_and_says_what_is_missing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.save(*answered(3))
    assert main(["init", "-w", str(bench.root)]) == 0
    command = ["judge", "-w", str(bench.root), str(bench.evaluation)]
    for arguments, message in (
        ([], "research: no judge's model: name it with --model"),
        (["--model", "m"], "research: no judge: set judge.url, or name with --url"),
        (["--model", "m", "--preset", "kind"], "research: --preset kind is not one of research, strict, browsecomp"),
        (["--model", "m", "--url", "nowhere"], "is no address; write http://host:port"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main([*command, "judge.concurrency=2", "--model", "m", "--url", bench.server.url, "--swap"]) == 0
    printed = capsys.readouterr()
    assert "| evaluation, research, m | all | 3 | 0 | 0 | 1.000 (0.292 to 1.000) | 1.000 (0.292 to 1.000) | 1.000" in printed.out
    assert "| evaluation, research, swapped, m | all | 3 |" in printed.out and "verdicts that stay" in printed.out
    assert "judge 100%" in printed.err and len(bench.published) == 2
    assert "url: null" in (bench.root / "params.yaml").read_text(), "a judge named for one call is written nowhere"
