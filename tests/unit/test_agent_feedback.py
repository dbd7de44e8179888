"""Verdicts on answers: taken for answers that were given, kept before they are acknowledged, and read back as questions."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from answering import DONE, THINK, Agent

from research_rl.agent import feedback
from research_rl.agent.feedback import Delivery, Feedback, FeedbackRequest, Given, rows
from research_rl.data.flashrag import read_questions
from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT

QUESTION = {"input": "Who founded Aldmoor Mill?"}


def judged(agent: Agent, identifier: str, **body: Any) -> tuple[int, dict[str, Any]]:
    reply = agent("/v1/feedback", {"response_id": identifier, "verdict": "up", **body})
    return reply.status_code, reply.json()


def journal(agent: Agent) -> list[dict[str, Any]]:
    path = agent.feedback.folder / "feedback.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def questions(agent: Agent) -> list[tuple[str, list[str]]]:
    return [(row.question, list(row.golden_answers)) for row in read_questions(agent.feedback.folder / "questions.jsonl")]


def test_a_praised_answer_becomes_a_question_of_a_folder_source() -> None:
    agent = Agent()
    response = agent(body=QUESTION).json()
    status, told = judged(agent, response["id"], comment=" well done ")
    assert (status, told) == (200, {"object": "feedback", "response_id": response["id"], "verdict": "up", "question": True})
    [line] = journal(agent)
    assert (line["verdict"], line["comment"], line["given_answer"], line["model"]) == ("up", "well done", "Ada King", "policy-test")
    assert line["episode"]["stop"] == "answered" and len(line["episode"]["searches"]) == 1
    [row] = read_questions(agent.feedback.folder / "questions.jsonl")
    assert (row.id, row.question, row.golden_answers) == (f"feedback-{line['id']}", QUESTION["input"], ("Ada King",))
    assert row.metadata["source"] == "feedback" and row.metadata["verdict"] == "up"
    for name in ("feedback.jsonl", "questions.jsonl"):
        assert (agent.feedback.folder / name).stat().st_mode & 0o777 == 0o600


def test_the_last_verdict_counts_and_a_correction_is_the_golden_answer() -> None:
    agent = Agent()
    identifier = agent(body=QUESTION).json()["id"]
    assert judged(agent, identifier, verdict="down")[1]["question"] is False
    assert (agent.feedback.folder / "questions.jsonl").read_text() == ""
    assert judged(agent, identifier)[1]["question"] is True and questions(agent) == [(QUESTION["input"], ["Ada King"])]
    assert judged(agent, identifier, verdict="down", answer="Ada Lovelace")[1]["question"] is True
    assert questions(agent) == [(QUESTION["input"], ["Ada Lovelace"])]
    assert [line["verdict"] for line in journal(agent)] == ["down", "up", "down"]
    assert [line["episode"] is None for line in journal(agent)] == [False, True, True], "an episode is written once"
    text = agent("/metrics").text
    assert 'agent_verdicts_total{outcome="down"} 2.0' in text and 'agent_verdicts_total{outcome="up"} 1.0' in text


def test_the_same_verdict_twice_is_one_and_one_answer_takes_no_endless_row() -> None:
    agent = Agent()
    identifier = agent(body=QUESTION).json()["id"]
    assert [judged(agent, identifier)[0] for _ in range(3)] == [200, 200, 200] and len(journal(agent)) == 1
    replies = [judged(agent, identifier, verdict=("down", "up")[number % 2]) for number in range(25)]
    assert len(journal(agent)) == 20 and replies[-2][0] == 400 and "20 times" in replies[-2][1]["error"]["message"]


def test_answers_to_one_question_make_one_row() -> None:
    agent = Agent()
    for answer in ("Ada", "Ada King", "Ada"):
        assert judged(agent, agent(body=QUESTION).json()["id"], answer=answer)[0] == 200
    chat = agent("/v1/chat/completions", {"messages": [{"role": "user", "content": "Another?"}]}).json()
    assert judged(agent, chat["id"])[0] == 200
    assert questions(agent) == [(QUESTION["input"], ["Ada", "Ada King"]), ("Another?", ["Ada King"])]


def test_praise_of_an_answer_that_is_none_makes_no_question() -> None:
    agent = Agent("I do not know$")
    assert judged(agent, agent(body=QUESTION).json()["id"])[1]["question"] is False
    assert (agent.feedback.folder / "questions.jsonl").read_text() == "" and len(journal(agent)) == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"response_id": "resp_unknown"}, 404, "response_id='resp_unknown' is none of the last 1,000 answers"),
        ({"response_id": "x" * 101}, 400, "response_id"),
        ({"response_id": ""}, 400, "response_id"),
        ({"verdict": "sideways"}, 400, "verdict=sideways"),
        ({"comment": "x" * 2001}, 400, "comment"),
        ({"answer": "x" * 1001}, 400, "answer"),
        ({"answer": "a\0b"}, 400, "a NUL"),
        ({"answer": 7}, 400, "answer=7"),
        ({"stars": 5}, 400, "stars=5"),
    ],
)
def test_what_is_no_verdict_on_an_answer_is_refused_and_not_kept(body: dict[str, Any], status: int, words: str) -> None:
    agent = Agent()
    given = {"response_id": agent(body=QUESTION).json()["id"], **body}
    found = judged(agent, given.pop("response_id"), **given)
    assert found[0] == status and words in found[1]["error"]["message"] and journal(agent) == []


def test_feedback_asks_for_the_token_and_the_oldest_answer_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "KEPT", 2)
    agent = Agent()
    first, *_, last = [agent(body=QUESTION).json()["id"] for _ in range(3)]
    assert (judged(agent, first)[0], judged(agent, last)[0]) == (404, 200)
    assert agent("/v1/feedback", {"response_id": last, "verdict": "up"}, headers={"Authorization": ""}).status_code == 401


def test_a_disk_that_takes_nothing_is_told_and_the_verdict_can_be_sent_again() -> None:
    agent = Agent()
    identifier = agent(body=QUESTION).json()["id"]
    agent.feedback.folder.write_text("a file where the folder should be")
    status, told = judged(agent, identifier)
    assert status == 503 and told["error"]["code"] == "disk"
    agent.feedback.folder.unlink()
    assert judged(agent, identifier)[0] == 200 and len(journal(agent)) == 1


def test_a_verdict_that_is_sent_again_makes_the_questions_that_the_disk_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    agent, write = Agent(), feedback.write_private
    identifier = agent(body=QUESTION).json()["id"]
    monkeypatch.setattr(feedback, "write_private", full)
    assert judged(agent, identifier)[0] == 503
    monkeypatch.setattr(feedback, "write_private", write)
    assert judged(agent, identifier)[0] == 200 and len(journal(agent)) == 1
    assert questions(agent) == [(QUESTION["input"], ["Ada King"])]


def test_two_services_of_one_workspace_keep_all_verdicts(tmp_path: Path) -> None:
    services = [Feedback(tmp_path), Feedback(tmp_path)]

    def judge(service: int) -> None:
        for number in range(40):
            identifier = f"{service}-{number}"
            services[service].remember(identifier, Given(f"question {identifier}", "a", "m", "v", {"text": "y" * 5000}))
            services[service].take(FeedbackRequest(response_id=f"resp_{identifier}", verdict="up"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(judge, range(2)))
    services[0].remember("last", Given("last", "a", "m", "v", {}))
    services[0].take(FeedbackRequest(response_id="resp_last", verdict="up"))
    assert len((tmp_path / "feedback.jsonl").read_text().splitlines()) == 81
    assert len(list(read_questions(tmp_path / "questions.jsonl"))) == 81


def test_no_answer_waits_for_the_disk_of_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, writes, free = Feedback(tmp_path), threading.Event(), threading.Event()
    kept.remember("a", Given("q", "a", "m", "v", {}))

    def slow(*_: Any, **__: Any) -> None:
        writes.set()
        assert free.wait(60)

    monkeypatch.setattr(feedback.json_lines, "append", slow)
    with ThreadPoolExecutor(1) as pool:
        judging = pool.submit(kept.take, FeedbackRequest(response_id="resp_a", verdict="up"))
        assert writes.wait(60)
        kept.remember("b", Given("q", "b", "m", "v", {}))
        assert not judging.done(), "remembering waited for the verdict"
        free.set()
        judging.result()


def test_a_foreign_or_torn_line_of_the_journal_costs_itself_alone() -> None:
    good = {"id": "a", "question": "q", "verdict": "up", "given_answer": "yes"}
    assert [row["golden_answers"] for row in rows([None, 7, {"id": "b"}, good])] == [["yes"]]


WRITER = """
import sys
from pathlib import Path
from research_rl.agent.feedback import Delivery, Feedback, FeedbackRequest, Given
kept = Feedback(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(100000):
    kept.remember(str(number), Given(f"question {number % 50}", "x" * 500, "m", "v", {"text": "y" * 500}))
    kept.take(FeedbackRequest(response_id=f"resp_{number}", verdict="up"))
    print(number, flush=True)
"""


def test_a_killed_service_leaves_whole_files_with_all_that_it_acknowledged(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert writer.stdout
    acknowledged = -1
    for line in writer.stdout:
        acknowledged = int(line) if line.strip().isdigit() else acknowledged
        if acknowledged >= 120:
            writer.kill()
            break
    rest = [int(line) for line in writer.stdout.read().split() if line.isdigit()]
    writer.wait()
    acknowledged = max([acknowledged, *rest])
    lines = (tmp_path / "feedback.jsonl").read_bytes().split(b"\n")
    whole = [json.loads(line) for line in lines[:-1]]
    assert {str(number) for number in range(acknowledged + 1)} <= {line["id"] for line in whole}
    assert len(list(read_questions(tmp_path / "questions.jsonl"))) == 50
    # The next service goes on with the same files.
    again = Feedback(tmp_path)
    again.remember("new", Given("a new question", "a", "m", "v", {}))
    again.take(FeedbackRequest(response_id="resp_new", verdict="up"))
    assert len(list(read_questions(tmp_path / "questions.jsonl"))) == 51


def test_what_cannot_be_passed_on_is_tried_again_and_asked_answers_wait_for_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def deliver() -> None:
        calls.append(len(calls))
        if len(calls) < 3:
            raise ServiceError("MLflow takes no verdicts now")

    async def main() -> int:
        async with Delivery(deliver, tmp_path, pause_s=0.01) as delivery:
            await asyncio.sleep(0.1)
            assert calls == [], "there is no journal yet"
            delivery.ask()
            while len(calls) < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert len(calls) == 3, "it was passed on and is sent again"
            return delivery.failures

    assert asyncio.run(asyncio.wait_for(main(), 60)) == 2


def test_an_episode_in_the_journal_is_what_was_played() -> None:
    agent = Agent()
    judged(agent, agent(body=QUESTION).json()["id"])
    wrote = [part["text"] for part in journal(agent)[0]["episode"]["segments"] if part["author"] == "model"]
    assert "".join(wrote) == THINK + DONE.removesuffix("$")
