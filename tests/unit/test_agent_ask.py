"""`research ask` in a terminal, through a pipe and over a running service; text of a policy or a passage cannot act on the terminal."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest
from answering import DONE, THINK, TOKEN, Agent, Shelf, listening, until

from research_rl import cli
from research_rl.agent import ask as asking
from research_rl.agent.ask import ServiceAsker, ask, ask_lines, converse
from research_rl.agent.backend import free_name
from research_rl.agent.command import Address, address_file, recorded_address
from research_rl.agent.piped import LONGEST, Line, lines
from research_rl.agent.printed import Printed
from research_rl.agent.service import AgentService
from research_rl.config import Config
from research_rl.episode.trajectory import Passage
from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.process import services
from research_rl.process.private import write_private

EVIL = "\x1b]0;title\x07\x9b2J\u202e\r"
Heard = list[str]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def configured(url: str, **more: Any) -> Config:
    return Config.model_validate({"agent": {"url": f"{url}/v1", **more}, "episode": {"max_searches": 3, "top_k": 3, "wall_s": 600}})


def events(agent: Agent) -> list[dict[str, Any]]:
    reply = agent(body={"input": "q", "stream": True})
    return [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_AGENT_TOKEN", TOKEN)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shown(agent: Agent, stream: io.StringIO) -> str:
    printed = Printed(stream)
    for event in events(agent):
        printed.take(event)
    return stream.getvalue()


def test_an_answer_reads_well_without_a_terminal() -> None:
    assert shown(Agent(), io.StringIO()).splitlines()[:-1] == [
        "I look it up.",
        "search: who founded Aldmoor Mill",
        '  [1] "Aldmoor Mill" Aldmoor Mill was founded by (Ada King), in 1801.',
        '  [2] "Borel" Borel is a town.',
        "It was Ada.",
        "answer: It is Ada King",
    ]
    assert shown(Agent(), io.StringIO()).splitlines()[-1].startswith("the answer stands in search 1 [1]; 1 search; ")


def test_each_author_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Agent(), Terminal())
    assert "\x1b[2mI" in text and "\x1b[36msearch: who" in text and "\x1b[33m  [1]" in text and "\x1b[1;32manswer: I" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(Agent(), Terminal())


def test_no_text_acts_on_the_terminal() -> None:
    turns = (THINK.replace("I look", f"I {EVIL} look").replace("who", f"w{EVIL}ho"), DONE.replace("Ada King", f"A{EVIL}da"))
    text = shown(Agent(*turns, shelf=Shelf(Passage("p", f"by {EVIL} Ada"))), io.StringIO())
    assert not set(EVIL.replace("title", "").replace("]0;", "").replace("2J", "")) & set(text)
    assert "\\x1b]0;title\\x07" in text and "\\u202e" in text


def test_an_episode_without_an_answer_says_why() -> None:
    assert "no answer: the policy ended without a complete answer" in shown(Agent("I do not know$"), io.StringIO())
    agent = Agent()
    agent.policy.fails = ServiceError("broke off")
    assert "no answer: the model server failed" in shown(agent, io.StringIO())


def test_a_question_is_answered_by_a_running_service(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    heard: Heard = []
    with listening(Agent()) as (url, _, _):
        ask(configured(url), Workspace(tmp_path), "Who?", None, heard.append)
        assert "answer: It is Ada King" in capsys.readouterr().out and heard == [f"asking the policy at {url}"]
        ask(configured(url), Workspace(tmp_path), "Who?", None, heard.append, as_json=True)
        [line] = capsys.readouterr().out.splitlines()
        assert json.loads(line)["question"] == "Who?" and json.loads(line)["research"]["answer"] == "Ada King"


def through(*pieces: bytes) -> Iterator[Line]:
    """Return the lines of a pipe into which another thread writes."""
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as pipe:
            pipe.writelines(pieces)

    threading.Thread(target=write).start()
    try:
        yield from lines(reading)
    finally:
        os.close(reading)


def test_a_pipe_of_questions_gives_json_lines_in_order(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    questions = through(b"one\n \r\n", b"x" * 5000, b"\nthree")
    # One place for four at once: a service that is full is asked again.
    with listening(Agent(concurrency=1)) as (url, _, _), pytest.raises(ServiceError, match="1 of 3 questions could not be answered"):
        ask_lines(configured(url, concurrency=3), Workspace(tmp_path), questions, None, lambda text: None)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in told] == ["one", "x" * 5000, "three"]
    assert [line["error"] is None for line in told] == [True, False, True]
    assert "agent.max_question_chars" in told[1]["error"]["message"]


def test_a_line_that_cannot_be_asked_costs_itself_alone(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    questions = through(b"one\n\xffwho\n", b"x" * (3 * LONGEST), b"y\nfour\n")
    with listening(Agent()) as (url, _, _), pytest.raises(ServiceError, match="2 of 4 questions could not be answered"):
        ask_lines(configured(url), Workspace(tmp_path), questions, None, lambda text: None)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in told] == ["one", "\ufffdwho", "x" * 200, "four"]
    assert told[1]["error"]["message"] == "the line is not UTF-8 at byte 1; convert it first, for example by iconv"
    assert told[2]["error"]["message"] == "the line has more than 1,048,576 bytes; shorten it"


def test_an_empty_pipe_starts_nothing(tmp_path: Any) -> None:
    ask_lines(Config(), Workspace(tmp_path), through(b"\n \n"), None, lambda text: pytest.fail(text))


class Held:
    """Answers no question before it is let go; counts those that are asked at the same time."""

    def __init__(self) -> None:
        self.free: dict[str, asyncio.Event] = {}
        self.now = self.most = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def events(self, question: str) -> AsyncGenerator[dict[str, Any]]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.free.setdefault(question, asyncio.Event()).wait()
            yield {"response": {"status": "completed", "error": None}}
        finally:
            self.now -= 1


def test_a_pipe_without_an_end_is_read_a_few_questions_ahead_of_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    asker, read = Held(), list[Line]()

    def endless() -> Iterator[Line]:
        for number in count():
            read.append(Line(str(number)))
            yield read[-1]

    async def taken() -> int:
        """Return how many lines were taken once no more are."""
        before = -1
        while before != (before := len(read)):
            await asyncio.sleep(0.2)
        return before

    async def main() -> None:
        work = asyncio.create_task(asking._all(lambda: asker, endless(), 2))
        window = 2 * asking._WINDOW
        assert window <= (first := await taken()) <= window + 2 and (asker.now, asker.most) == (2, 2)
        asker.free["1"].set()
        assert await taken() == first and not capsys.readouterr().out, "the second answer waits for the first"
        asker.free["0"].set()
        assert await taken() == first + 2 and asker.most == 2
        assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == ["0", "1"]
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert asker.now == 0, "a question outlived the pipe"

    asyncio.run(main())


@contextmanager
def piped(url: str, folder: Path) -> Generator[subprocess.Popen[str]]:
    """Run the command with open pipes; what it does not end by itself is killed."""
    command = [sys.executable, "-m", "research_rl", "ask", "--json", "--profile", "laptop", "--workspace", str(folder)]
    limits = ["episode.max_searches=3", "episode.top_k=3", "episode.wall_s=600"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*command, f"agent.url={url}", *limits], text=True, bufsize=1, cwd=CHECKOUT, **pipes)
    overdue = threading.Timer(60, process.kill)
    overdue.start()
    try:
        yield process
    finally:
        overdue.cancel()
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], question: str) -> str:
    """Ask through the open pipe; return the question of the line that comes."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{question}\n")
    line = process.stdout.readline()
    assert line, "no answer while the pipe is open"
    return json.loads(line)["question"]


def test_an_open_pipe_is_answered_line_by_line_until_it_is_interrupted(tmp_path: Path) -> None:
    with listening(Agent()) as (url, _, _), piped(url, tmp_path) as process:
        assert [answer(process, "one"), answer(process, "two")] == ["one", "two"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr
        assert process.stderr.read() == f"asking the policy at {url}\n"


def test_without_a_question_and_without_an_input_it_says_what_to_give(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m research_rl ask --profile laptop --workspace {tmp_path} <&-"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, cwd=CHECKOUT, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "research: no question and no standard input; give the question as an argument, or questions by a pipe\n"


def test_a_reader_that_has_seen_enough_ends_an_open_pipe(tmp_path: Path) -> None:
    with listening(Agent()) as (url, _, _), piped(url, tmp_path) as process:
        assert process.stdin and process.stdout and process.stderr
        assert answer(process, "one") == "one"
        process.stdout.close()
        process.stdin.write("two\n")
        assert process.wait(60) == 0 and process.stderr.read() == f"asking the policy at {url}\n"


def test_a_service_that_refuses_or_is_gone_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(Agent()) as (url, _, _):
        monkeypatch.setenv("RESEARCH_AGENT_TOKEN", "wrong")
        with pytest.raises(ServiceError, match=r"HTTP 401\): the bearer token is missing or wrong"):
            ask(configured(url), Workspace(tmp_path), "Who?", None, lambda text: None)
    with pytest.raises(ServiceError, match="does not answer"):
        ask(configured(url), Workspace(tmp_path), "Who?", None, lambda text: None)


def test_a_stream_that_ends_before_the_answer_does_is_no_success(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(service: Any, asked: Any) -> AsyncGenerator[bytes]:
        for event in asked.wire.begin():
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    monkeypatch.setattr(AgentService, "_events", cut)
    with listening(Agent()) as (url, _, _):
        for as_json in (False, True):
            with pytest.raises(ServiceError, match="ended its stream before the answer was whole"):
                ask(configured(url), Workspace(tmp_path), "Who?", None, lambda text: None, as_json=as_json)


def test_a_model_cannot_be_chosen_where_a_service_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model='other' is not what http://127.0.0.1:1/v1 answers with; .* clear agent.url"):
        ask(configured("http://127.0.0.1:1"), Workspace(tmp_path), "Who?", Path("other"), lambda text: None)


def test_the_prompt_goes_on_after_a_stopped_answer_and_after_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def one(opened: Any, question: str, printed: Any) -> str:
        asked.append(question)
        raise {"stop": KeyboardInterrupt(), "fail": ServiceError("the service is gone")}.get(question) or SystemExit

    typed = iter(["stop", "  ", "fail"])

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(asking, "_one", one)
    monkeypatch.setattr("builtins.input", read)
    converse(configured("http://127.0.0.1:1"), Workspace(tmp_path), None, lambda text: None)
    assert asked == ["stop", "fail"]
    assert "stopped" in (told := capsys.readouterr().err) and "research: the service is gone" in told


def test_an_answer_that_is_cancelled_ends_its_episode() -> None:
    agent = Agent()
    agent.policy.holds = threading.Event()

    async def main(url: str) -> None:
        async with ServiceAsker(Address(url, TOKEN, "m"), configured(url)) as asker:
            stream = asker.events("Who?")
            while (await anext(stream))["type"] != "response.reasoning_text.delta":
                pass
            await stream.aclose()

    with listening(agent) as (url, _, _):
        asyncio.run(main(url))
        until(agent.policy.cancelled.is_set)


def test_a_service_of_another_model_is_not_asked(tmp_path: Any) -> None:
    workspace, heard = Workspace(tmp_path), Heard()
    assert asking._running(Config(), workspace, None, heard.append) is None and recorded_address(workspace) is None
    with listening(Agent()) as (url, _, _):
        write_private(address_file(workspace), json.dumps({"url": url, "token": TOKEN, "model": "policy-mine"}))
        assert asking._running(Config(), workspace, tmp_path / "mine", heard.append) == Address(url, TOKEN, "policy-mine")
        assert asking._running(Config(), workspace, tmp_path / "other", heard.append) is None
    assert heard == [f"the service at {url} answers with policy-mine and not with policy-other"]
    assert asking._running(Config(), workspace, tmp_path / "mine", heard.append) is None, "a service that is gone was found"


@pytest.mark.parametrize(
    ("argv", "question", "overrides"),
    [
        (["ask", "Who is a=b?"], "Who is a=b?", []),
        (["ask", "x=1"], "x=1", []),
        (["ask", "episode.top_k=2"], None, ["episode.top_k=2"]),
        (["ask", "Who?", "episode.top_k=2"], "Who?", ["episode.top_k=2"]),
        (["ask", "episode.top_k=2", "Who?"], "Who?", ["episode.top_k=2"]),
        (["ask", "episode.top_k=2", "train.steps=3", "Is a=b?"], "Is a=b?", ["episode.top_k=2", "train.steps=3"]),
        (["ask", "episode.top_k=2", "Who?", "more"], "Who?", ["episode.top_k=2", "more"]),
        (["ask", "--json", "episode.top_k=2", "train.steps=3"], None, ["episode.top_k=2", "train.steps=3"]),
        (["ask"], None, []),
    ],
)
def test_the_question_may_be_left_out(argv: list[str], question: str | None, overrides: list[str]) -> None:
    arguments = cli._parse(argv)
    cli._shift_question(arguments)
    assert (arguments.question, arguments.overrides) == (question, overrides)


def test_questions_of_two_terminals_have_servers_of_their_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert free_name(workspace, "ask") == "ask"
    process = services.spawn("ask-model", ["sleep", "600"], folder=workspace.services)
    try:
        assert free_name(workspace, "ask") == "ask-2"
    finally:
        process.stop()
    assert free_name(workspace, "ask") == "ask"
