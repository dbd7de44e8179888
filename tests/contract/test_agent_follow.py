"""The agent follows an alias of the registry: model servers over real HTTP come and go, and no question is lost.

The registry's own answers are held in test_mlflow_champion.py; here a table stands for it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from research_rl.agent.backend import SecondPolicy, Servers, WorkspaceSource, servers
from research_rl.agent.chosen import AliasMemory, Chosen, alias_of, choose, of_alias, registered
from research_rl.agent.feedback import Feedback
from research_rl.agent.follow import Following
from research_rl.agent.service import AgentService
from research_rl.agent.shadow import Shadow
from research_rl.config import Config
from research_rl.episode.agent import Limits
from research_rl.episode.prompts import FolderTokenizer
from research_rl.episode.trajectory import Passage
from research_rl.errors import ConfigError, ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process.registry import FetchedVersion
from tests import waiting
from tests.answering import HEADERS, TOKEN, Agent, listening
from tests.contract import chain_model
from tests.knowledge import built
from tests.model_server import interpreter
from tests.searching import served

ALIAS = "policies@champion"
WORDS = ("one", "two", "three", "four", "broken", "dead")
NEWS: dict[str, Any] = {"trust_env": False, "timeout": 600.0}


def model(folder: Path, word: str, pause_s: float, fault: str | None = None) -> Path:
    """Write a model that thinks and answers `word`, with one search in between."""
    chain = {"?": "<think>", "hmm": word, "Borel": "Ada", "}": "</answer>"}
    chain_model.build(folder, chain, ("who", "wrote", *WORDS))
    tokenizer = FolderTokenizer(folder)
    first = tokenizer.encode(f"<think> {word} </think> <search> Borel </search>")
    last = tokenizer.encode(f"<answer> \\boxed{{ {word} }} </answer>")
    [reads] = tokenizer.encode("</result>")
    turns = {"first": first, "last": last, "ends": tokenizer.eos_id, "reads": reads, "pause_s": pause_s, "fault": fault}
    (folder / "turns.json").write_text(json.dumps(turns))
    return folder


@dataclass
class Table:
    """A registry: versions by number, and the one that the alias names; `failure` is raised instead of an answer."""

    folders: dict[str, Path]
    champion: str = "1"
    failure: Exception | None = None
    asked: int = 0

    def fetch(self, name: str) -> FetchedVersion:
        self.asked += 1
        if self.failure:
            raise self.failure
        version = self.champion if "@" in name else name.rpartition("/")[2]
        return FetchedVersion(version, self.folders[version])


@dataclass
class Running:
    """A service that follows the table, and its address."""

    url: str
    service: AgentService
    running: Servers
    table: Table
    source: WorkspaceSource
    moved: list[str] = field(default_factory=list[str])

    def info(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/info", headers=HEADERS, **NEWS).json()

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", headers=HEADERS, **NEWS).text

    def move(self, version: str) -> None:
        """Point the alias at a version and wait until it serves."""
        self.table.champion, name = version, f"registry:policies/{version}"

        # A try of the version before may still fail meanwhile.
        def refused() -> bool:
            return (self.info()["last_failed_switch"] or {}).get("what") == name

        waiting.until(lambda: self.info()["version"] == name, refused)
        assert self.info()["version"] == name, self.info()

    def ask(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/responses", json={"input": "who wrote Borel", **body}, headers=HEADERS, **NEWS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {str(number): model(root / word, word, 0.01) for number, word in enumerate(WORDS[:4], 1)}
    faulty = {"8": model(root / "broken", "broken", 0.01, "turn"), "9": model(root / "dead", "dead", 0.01, "start")}
    return found | faulty


@pytest.fixture(scope="module")
def retriever() -> Iterator[str]:
    with served(lambda queries, top_k: [[Passage("p1", "Ada wrote one")] for _ in queries]) as url:
        yield url


def configured(root: Path, retriever: str | None, **agent: Any) -> Config:
    (root / "template.txt").write_text("{question} ?")
    return Config.model_validate(
        {
            "prompt": {"template": "file", "path": str(root / "template.txt"), "max_tokens": 64},
            "episode": {"max_response_tokens": 64, "top_k": 1, "max_searches": 2, "wall_s": 600},
            "serving": {"start_deadline_s": waiting.PATIENCE_S},
            "retriever": {"url": retriever} if retriever else {},
            "environments": {"policy": str(interpreter(root))},
            "agent": {"follow_s": 0.05, "concurrency": 32, **agent},
        }
    )


@contextmanager
def following(root: Path, retriever: str | None, table: Table, challenger: Path | None = None, **agent: Any) -> Generator[Running]:
    """Yield a service as `research serve-agent` builds it, with the table as its registry."""
    config, workspace, moved = configured(root, retriever, **agent), Workspace(root), list[str]()
    chosen = of_alias(ALIAS, table.fetch)
    with servers(config, workspace, chosen, lambda text: None, "agent") as running:
        source = WorkspaceSource(config, workspace, chosen, running, config.agent.concurrency)
        limits = Limits(**config.episode.model_dump())
        follows = Following(
            source, ALIAS, lambda: of_alias(ALIAS, table.fetch), config.agent, limits, lambda chosen, name: moved.append(name)
        )
        shadow: Shadow | None = None
        if challenger:
            second = SecondPolicy(config, Chosen("challenger", challenger), source, running)
            shadow = Shadow(second, "challenger", 1.0, root / "shadow.jsonl")
        service = AgentService(follows, config, TOKEN, feedback=Feedback(root / "agent"), shadow=shadow)
        stand_in = cast(Agent, SimpleNamespace(service=service, policy=SimpleNamespace(holds=None)))
        with listening(stand_in) as (url, _, _):
            yield Running(url, service, running, table, source, moved)


def words(response: dict[str, Any]) -> tuple[str, str, str]:
    """Return the model's name, the word that it thought and the word that it answered."""
    assert response["status"] == "completed", response
    thought = next(item for item in response["output"] if item["type"] == "reasoning")["content"][0]["text"]
    return response["model"], thought, response["research"]["answer"]


def model_servers(workspace: Path) -> list[str]:
    return sorted(path.stem for path in (workspace / ".services").glob("*.pid"))


async def _client(url: str, number: int, stop: Callable[[], bool], seen: list[tuple[str, str, str]], failed: list[str]) -> None:
    """Ask one question after the other, every second client by streams."""
    # A connection a question: on a busy machine one that is kept may be closed for its age just when it is used again.
    async with httpx.AsyncClient(headers=HEADERS, limits=httpx.Limits(max_keepalive_connections=0), **NEWS) as client:
        while not stop():
            # Half of them name a model, as clients do that ask which there are.
            names = (await client.get(f"{url}/v1/models")).json()["data"] if number % 4 > 1 else []
            model = {"model": names[number % 2]["id"]} if names else {}
            reply = await client.post(f"{url}/v1/responses", json={"input": "who wrote Borel", "stream": bool(number % 2), **model})
            if not reply.is_success:
                failed.append(f"HTTP {reply.status_code}: {reply.text[:200]}")
            elif number % 2:
                last = [line for line in reply.text.split("\n") if line.startswith("data: {")][-1]
                seen.append(words(json.loads(last[6:])["response"]))
            else:
                seen.append(words(reply.json()))


def load(running: Running, requests: int, moves: list[str]) -> list[tuple[str, str, str]]:
    """Ask with 16 clients until `requests` were answered and the alias has gone through `moves`; return what was seen."""
    seen, failed, over = list[tuple[str, str, str]](), list[str](), threading.Event()

    async def clients() -> None:
        await asyncio.gather(*(_client(running.url, number, over.is_set, seen, failed) for number in range(16)))

    def ask() -> None:
        try:
            asyncio.run(clients())
        except Exception as error:  # noqa: BLE001 - whatever ends the clients ends the test, with its reason
            failed.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for number, version in enumerate(moves):
            share = requests * (number + 1) // (len(moves) + 1)
            assert waiting.until(lambda share=share: len(seen) >= share, over=lambda: failed) and not failed, failed
            running.move(version)
        waiting.until(lambda: len(seen) >= requests, over=lambda: failed)
    finally:
        over.set()
        asking.join()
    assert failed == [] and len(seen) >= requests
    return seen


def check(seen: list[tuple[str, str, str]], versions: set[str]) -> None:
    expected = {(f"policy-{WORDS[int(version) - 1]}", *(WORDS[int(version) - 1],) * 2) for version in versions}
    assert set(seen) == expected, "a question was answered by two models, or named another than answered it"


def test_no_question_is_lost_when_the_alias_moves_twice(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        since = running.info()["since"]
        seen = load(running, 100, ["2", "3"])
        check(seen, {"1", "2", "3"})
        assert running.moved == ["policy-two", "policy-three"]
        told = running.info()
        assert (told["model"], told["follows"], told["switches"], told["failed_switches"]) == ("policy-three", ALIAS, 2, 0)
        assert told["since"] > since and told["last_failed_switch"] is None
        assert 'agent_model_info{model="policy-three",version="registry:policies/3"} 1.0' in running.metrics()
        assert "policy-one" not in running.metrics() and "agent_switches_total 2.0" in running.metrics()
        assert waiting.until(lambda: len(model_servers(tmp_path)) == 1), "a model server of an earlier version goes on"
        # A client may go on with the name that an earlier answer gave.
        for name in ("research-agent", "policy-three", "policy-one"):
            assert words(running.ask(model=name).json())[0] == "policy-three"
        assert running.ask(model="policy-four").status_code == 404
    assert model_servers(tmp_path) == []


@pytest.mark.long
def test_a_thousand_questions_of_16_clients_outlive_seven_moves(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        began = time.monotonic()
        seen = load(running, 1000, ["2", "3", "4", "1", "2", "1", "3"])
        check(seen, {"1", "2", "3", "4"})
        assert running.info()["switches"] == 7
        print(f"{len(seen)} questions, 7 moves, {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize(("version", "reason"), [("8", "canary question failed"), ("9", "ended with code")])
def test_a_version_that_does_not_answer_serves_nobody(
    version: str, reason: str, tmp_path: Path, retriever: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        running.table.champion = version
        assert waiting.until(lambda: running.info()["failed_switches"] >= 2), "it is tried again"
        told = running.info()
        assert told["model"] == "policy-one" and words(running.ask().json()) == ("policy-one", "one", "one")
        assert told["last_failed_switch"]["what"] == f"registry:policies/{version}" and reason in told["last_failed_switch"]["reason"]
        assert "\n" not in told["last_failed_switch"]["reason"]
        assert "agent_failed_switch_seconds 0.0" not in running.metrics()
        assert any("does not serve" in record.message and "policies/1 goes on" in record.message for record in caplog.records)
        # Between two tries, whose pause grows.
        assert waiting.until(lambda: model_servers(tmp_path) == ["agent-model"]), "a server that did not serve goes on"
        # What failed is passed over once the alias points elsewhere.
        running.move("2")
        assert words(running.ask().json())[0] == "policy-two"


def test_a_model_that_ignores_the_operators_question_does_not_serve(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    silent = model(tmp_path / "silent", "two", 0.0)
    turns = json.loads((silent / "turns.json").read_text())
    (silent / "turns.json").write_text(json.dumps({**turns, "last": turns["first"][:2]}))
    with following(tmp_path, retriever, Table({**folders, "7": silent}), canary="who wrote Borel") as running:
        running.table.champion = "7"
        assert waiting.until(lambda: running.info()["failed_switches"])
        assert "no answer to agent.canary='who wrote Borel' (malformed)" in running.info()["last_failed_switch"]["reason"]
        running.move("2")


def test_a_registry_that_does_not_answer_changes_nothing_and_is_told(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        running.table.failure = ServiceError("MLflow cannot be reached")
        assert waiting.until(lambda: running.info()["registry_trouble"])
        assert running.info()["registry_trouble"]["reason"] == "MLflow cannot be reached"
        assert words(running.ask().json())[0] == "policy-one" and "agent_registry_failures_total 0.0" not in running.metrics()
        running.table.failure, running.table.champion = None, "2"
        assert waiting.until(lambda: running.info()["model"] == "policy-two")
        assert running.info()["registry_trouble"] is None


def test_an_old_model_is_given_drain_s_for_its_last_questions(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    slow = model(tmp_path / "slow", "one", 5.0)
    replies: list[httpx.Response] = []
    with following(tmp_path, retriever, Table({**folders, "1": slow}), drain_s=0.1) as running:
        asking = threading.Thread(target=lambda: replies.append(running.ask()))
        asking.start()
        assert waiting.until(lambda: running.service.active == 1)
        running.move("2")
        assert words(running.ask().json())[0] == "policy-two"
        asking.join()
        # It was cut off and says so; nothing hangs.
        assert replies[0].status_code == 502 and replies[0].json()["status"] == "failed"
        assert waiting.until(lambda: len(model_servers(tmp_path)) == 1)


def test_a_new_model_server_that_dies_is_started_again(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        running.move("2")
        assert waiting.until(lambda: len(model_servers(tmp_path)) == 1)
        [name] = model_servers(tmp_path)
        pid = json.loads((tmp_path / ".services" / f"{name}.pid").read_text())["pid"]
        for child in psutil.Process(pid).children():
            child.kill()
        assert waiting.until(lambda: running.ask().status_code == 200 and psutil.pid_exists(pid) is False)
        assert words(running.ask().json())[0] == "policy-two"


def test_a_pid_file_that_another_container_removes_or_replaces_starts_nothing_again(
    tmp_path: Path, retriever: str, folders: dict[str, Path]
) -> None:
    with following(tmp_path, retriever, Table(folders)) as running:
        [path] = (tmp_path / ".services").glob("*.pid")
        foreign, notes = {**json.loads(path.read_text()), "pid": 2**22 - 1}, list[bool]()
        for change in (path.unlink, lambda: path.write_text(json.dumps(foreign))):
            change()
            notes.append(running.running.model.check())
        assert notes == [False, False] and words(running.ask().json())[0] == "policy-one"


def test_servers_that_are_killed_under_load_leave_no_request_without_an_end(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Sixteen clients; the model server is killed, then the retriever: each request ends with an answer or says that it failed."""
    built(tmp_path, 60, encoder={"dim": 64})
    with following(tmp_path, None, Table(folders)) as running:
        ended, failed = list[dict[str, Any]](), list[str]()

        async def client(number: int) -> None:
            async with httpx.AsyncClient(headers=HEADERS, limits=httpx.Limits(max_keepalive_connections=0), **NEWS) as asking:
                while not over.is_set():
                    body = {"input": "who wrote Borel", "stream": bool(number % 2)}
                    reply = await asking.post(f"{running.url}/v1/responses", json=body)
                    if number % 2:
                        assert reply.text.endswith("data: [DONE]\n\n"), "a stream broke off"
                        last = [line for line in reply.text.split("\n") if line.startswith("data: {")][-1]
                        ended.append(json.loads(last[6:])["response"])
                    else:
                        ended.append(reply.json())

        async def clients() -> None:
            await asyncio.gather(*(client(number) for number in range(16)))

        def ask() -> None:
            try:
                asyncio.run(clients())
            except Exception as error:  # noqa: BLE001 - whatever ends the clients ends the test, with its reason
                failed.append(repr(error))

        over, asking = threading.Event(), threading.Thread(target=ask)
        asking.start()
        try:
            for folder in (tmp_path / ".services", tmp_path / ".serving" / "agent"):
                [path] = folder.glob("*.pid")
                before = len(ended)
                assert waiting.until(lambda before=before: len(ended) >= before + 16, over=lambda: failed), failed
                for process in psutil.Process(json.loads(path.read_text())["pid"]).children():
                    process.kill()
                assert waiting.until(
                    lambda path=path: running.ask().json()["status"] == "completed" and path.is_file(), over=lambda: failed
                )
        finally:
            over.set()
            asking.join(600)
        assert not asking.is_alive() and failed == []
        statuses = {response["status"] for response in ended}
        assert "completed" in statuses and statuses <= {"completed", "failed"}, statuses


def test_a_service_ends_while_a_new_model_starts(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    stuck = model(tmp_path / "stuck", "two", 600.0)
    with following(tmp_path, retriever, Table({**folders, "6": stuck})) as running:
        running.table.champion = "6"
        assert waiting.until(lambda: len(model_servers(tmp_path)) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 300 and model_servers(tmp_path) == []


def test_a_challenger_plays_what_was_answered_and_both_sides_are_kept(tmp_path: Path, retriever: str, folders: dict[str, Path]) -> None:
    with following(tmp_path, retriever, Table(folders), challenger=folders["3"]) as running:
        assert waiting.until(lambda: running.info()["challenger"]["ready"])
        reply = running.ask().json()
        assert words(reply)[0] == "policy-one"
        assert waiting.until(lambda: running.info()["challenger"]["played"] == 1)
        [line] = [json.loads(text) for text in (tmp_path / "shadow.jsonl").read_text().splitlines()]
        assert f"resp_{line['id']}" == reply["id"] and line["question"] == "who wrote Borel"
        sides = {name: line[name] for name in ("champion", "challenger")}
        assert {name: (side["model"], side["answer"], side["stop"]) for name, side in sides.items()} == {
            "champion": ("policy-one", "one", "answered"),
            "challenger": ("policy-three", "three", "answered"),
        }
        assert all(side["searches"] == ["Borel"] and side["seconds"] > 0 and side["written_tokens"] > 0 for side in sides.values())
        assert (tmp_path / "shadow.jsonl").stat().st_mode & 0o777 == 0o600
        # It has a server of its own, which a switch of the model in service leaves alone.
        running.move("2")
        assert waiting.until(lambda: len(model_servers(tmp_path)) == 2)
        assert 'agent_challenged_total{outcome="played"}' in running.metrics()


def test_names_are_those_of_an_evaluation_and_an_alias_is_told_apart(tmp_path: Path, folders: dict[str, Path]) -> None:
    table, space = Table(folders), Workspace(tmp_path)
    config = Config()

    def chosen(choice: str) -> Chosen:
        return choose(choice, config, space, table.fetch)

    assert alias_of("registry:policies@champion") == ALIAS
    assert alias_of("registry:policies/2") is None and alias_of("some@folder") is None and alias_of("hub:a/b@main") is None
    assert (chosen(f"registry:{ALIAS}").name, chosen(f"registry:{ALIAS}").folder) == ("registry:policies/1", folders["1"])
    assert chosen("registry:policies/2").served == "policy-two" and chosen(str(folders["3"])).served == "policy-three"
    with pytest.raises(ConfigError, match="--model nowhere is neither before nor after nor hub:NAME"):
        chosen("nowhere")
    assert registered("7", config) == "registry:research-rl/7" and registered("before", config) == "before"
    with pytest.raises(ConfigError, match=r"tracking\.registered_model is empty; name registry:NAME/7"):
        registered("7", Config.model_validate({"tracking": {"registered_model": None}}))


def test_a_version_whose_folder_holds_another_model_by_now_is_fetched_again(tmp_path: Path, folders: dict[str, Path]) -> None:
    table = Table({"1": folders["1"]})
    chosen = of_alias(ALIAS, table.fetch)
    assert chosen.place() == folders["1"] and table.asked == 1, "the registry is not asked for what stands"
    moved = Chosen(chosen.name, folders["2"], chosen.again)
    object.__setattr__(moved, "served", "policy-one")
    assert moved.place() == folders["1"]


def test_what_an_alias_named_last_is_remembered_while_it_stands(tmp_path: Path, folders: dict[str, Path]) -> None:
    memory = AliasMemory(tmp_path / "kept" / "followed.json")
    assert memory.recall(ALIAS) is None
    memory.keep(ALIAS, of_alias(ALIAS, Table(folders).fetch))
    found = memory.recall(ALIAS)
    assert found and (found.name, found.folder) == ("registry:policies/1", folders["1"])
    assert memory.recall("policies@other") is None
    kept = json.loads(memory.path.read_text())
    memory.path.write_text(json.dumps({**kept, "folder": str(folders["2"])}))
    assert memory.recall(ALIAS) is None, "another model than the remembered one stands there"
