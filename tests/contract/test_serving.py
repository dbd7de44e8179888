"""A real vLLM server answers the HTTP engine with exact token ids, refuses what it must, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import chain_model
import httpx
import psutil
import pytest
from answering import until
from generating import SEARCH_END, ask, children, once
from searching import served

from research_rl.agent.command import address_file
from research_rl.config import Config
from research_rl.episode.agent import Completion
from research_rl.episode.prompts import FolderTokenizer, load_tokenizer
from research_rl.episode.trajectory import Passage
from research_rl.errors import ServiceError
from research_rl.evaluation.evaluate import Player, evaluate
from research_rl.evaluation.methods import find
from research_rl.evaluation.results import HeldOutQuestion
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving.client import HttpEngine, Sampling
from research_rl.serving.serve import running
from tests.waiting import PATIENCE_S

CHAIN = {
    "?": "<think>",
    "<think>": "hmm",
    "hmm": "</think>",
    "</think>": "<search>",
    "<search>": "Borel",
    "Borel": "</search>",
    "</result>": "<answer>",
    "<answer>": "\\boxed{",
    "\\boxed{": "Ada",
    "Ada": "}",
    "}": "</answer>",
    "</answer>": chain_model.EOS,
    "tick": "tock",
    "tock": "tick",
    "coin": ("head", "tail"),
    "head": "coin",
    "tail": "coin",
}
CONFIG = Config.model_validate(
    {
        "prompt": {"template": "file", "path": "PATH", "max_tokens": 64},
        "episode": {"max_response_tokens": 64, "top_k": 1},
        "serving": {"start_deadline_s": PATIENCE_S},
    }
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> Path:
    return chain_model.build(workspace.root / "chain", CHAIN, ("who", "wrote", "Borel"))


@pytest.fixture(scope="module")
def endpoint(workspace: Workspace, model: Path) -> Iterator[Endpoint]:
    before = children()
    with running(CONFIG, workspace, model, name="chain") as found:
        assert children() > before
        yield found
    assert children() <= before, "a process of the server outlived its block"
    assert list(workspace.services.glob("*.pid")) == []


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> FolderTokenizer:
    return load_tokenizer(model)


def test_a_stop_string_ends_a_turn_and_its_tokens_are_returned(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    found = once(endpoint, tokenizer.encode("who wrote ?"), 50)
    assert found.finished_by == "stop"
    assert list(found.ids) == tokenizer.encode("<think> hmm </think> <search> Borel </search>")
    assert len(found.logprobs) == len(found.ids) and all(-1e-3 < value <= 0 for value in found.logprobs)


def test_eos_ends_a_turn_and_is_returned(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    found = once(endpoint, tokenizer.encode("</result>"), 50)
    assert found.finished_by == "eos"
    assert list(found.ids) == [*tokenizer.encode("<answer> \\boxed{ Ada } </answer>"), tokenizer.eos_id]


def test_the_token_budget_ends_a_turn(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    found = once(endpoint, tokenizer.encode("tick"), 5)
    assert (found.finished_by, list(found.ids)) == ("length", tokenizer.encode("tock tick tock tick tock"))


def test_a_streamed_turn_is_the_turn_in_pieces(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    async def main(ids: list[int], limit: int) -> tuple[Completion, list[Sequence[int]]]:
        pieces: list[Sequence[int]] = []
        async with HttpEngine(endpoint, Sampling(logprobs=True)) as engine:
            return await engine.stream(ids, SEARCH_END, limit, pieces.append), pieces

    for text, limit in (("who wrote ?", 50), ("</result>", 50), ("tick", 5)):
        ids = tokenizer.encode(text)
        streamed, pieces = asyncio.run(main(ids, limit))
        whole = once(endpoint, ids, limit)
        assert (streamed.ids, streamed.finished_by) == (whole.ids, whole.finished_by)
        assert streamed.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
        assert len(pieces) > 1 and tuple(token for piece in pieces for token in piece) == whole.ids


def test_drawn_tokens_depend_on_prompt_and_seed_alone(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    first, again, other = (once(endpoint, tokenizer.encode("coin"), 60, Sampling(1.0, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.ids != other.ids
    assert 5 < tokenizer.decode(first.ids).count("head") < 25


def test_many_turns_at_once_equal_the_same_turns_alone(endpoint: Endpoint, tokenizer: FolderTokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("who wrote ?", "</result>", "tick", "tock") for _ in range(16)]

    async def together(engine: HttpEngine) -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(ids, SEARCH_END, 12) for ids in prompts)))

    alone = {tuple(ids): once(endpoint, ids, 12, Sampling()) for ids in prompts[::16]}
    assert ask(endpoint, Sampling(), together) == [alone[tuple(ids)] for ids in prompts]


def test_a_wrong_token_or_model_is_refused_at_once(endpoint: Endpoint) -> None:
    with pytest.raises(ServiceError, match="HTTP 401"):
        once(Endpoint(endpoint.url, "wrong", endpoint.model), [1], 1)
    with pytest.raises(ServiceError, match="HTTP 404"):
        once(Endpoint(endpoint.url, endpoint.token, "other"), [1], 1)


def test_a_server_of_another_model_is_not_used(
    endpoint: Endpoint, workspace: Workspace, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEARCH_SERVING_TOKEN", endpoint.token or "")
    config = CONFIG.model_copy(update={"serving": CONFIG.serving.model_copy(update={"url": f"{endpoint.url}/v1"})})
    with running(config, workspace, model) as found:
        assert found == endpoint
    another = chain_model.build(tmp_path / "another", CHAIN)
    refused = pytest.raises(ServiceError, match=r"serves \['policy-chain'\], this stage needs 'policy-another'")
    with refused, running(config, workspace, another):
        pytest.fail("used a server of another model")


def test_the_token_is_asked_for_and_stands_in_no_command_line(endpoint: Endpoint, workspace: Workspace) -> None:
    assert httpx.get(f"{endpoint.url}/v1/models", trust_env=False).status_code == 401
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True) if process.is_running()]
    assert any("vllm" in command for command in commands)
    assert not any(endpoint.token in command for command in commands)
    assert endpoint.token not in json.dumps([path.read_text() for path in workspace.services.glob("*.pid")])


class Shelf:
    """Finds the same passage for every query."""

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [[Passage("p1", "Ada wrote Borel")] for _ in queries]


def test_whole_episodes_are_played_and_measured(endpoint: Endpoint, tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{question} ?")
    config = CONFIG.model_copy(update={"prompt": CONFIG.prompt.model_copy(update={"path": str(template)})})
    questions = [
        HeldOutQuestion(row, str(row), "test", "who wrote Borel", ("Ada",) if row % 2 else ("Bob",), ("p1", "p2")) for row in range(40)
    ]

    async def main() -> list[tuple[float, float, bool, int, float | None, str]]:
        async with HttpEngine(endpoint, Sampling()) as engine:
            player = Player(config, tokenizer, find("research"), 0, lambda identifiers: [])
            results = await evaluate(player, questions, engine, Shelf(), lambda result: None)
            return [(r.f1, r.em, r.format, r.searches, r.recall, r.stop) for r in results]

    assert asyncio.run(main()) == [(row % 2, row % 2, True, 1, 0.5, "answered") for row in range(40)]


def test_the_agent_is_served_and_asked_over_a_real_engine(endpoint: Endpoint, model: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("{question} ?")
    with served(lambda queries, top_k: [[Passage("p1", "Ada wrote Borel")] for _ in queries]) as retriever:
        given = [f"retriever.url={retriever}", f"serving.url={endpoint.url}/v1", "prompt.template=file", "prompt.max_tokens=64"]
        given += [f"prompt.path={tmp_path / 'template.txt'}", "episode.max_response_tokens=64", "episode.top_k=1"]
        common = ["--workspace", str(tmp_path), "--profile", "laptop", "--model", str(model), *given]
        env = {**os.environ, "RESEARCH_SERVING_TOKEN": endpoint.token or ""}

        def asked(*more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "research_rl", "ask", *more, *common]
            return subprocess.run(command, capture_output=True, text=True, env=env, cwd=CHECKOUT, timeout=600)

        alone = asked("--json", "who wrote Borel")
        assert "no agent service runs here" in alone.stderr, alone.stderr
        command = [sys.executable, "-m", "research_rl", "serve-agent", *common]
        service = subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
        try:
            until(lambda: service.poll() is not None or _ready(Workspace(tmp_path)), 600)
            over_http = asked("--json", "who wrote Borel")
            assert "asking policy-chain at" in over_http.stderr, over_http.stderr
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(60)
    assert not address_file(Workspace(tmp_path)).exists()
    for done in (alone, over_http):
        told = json.loads(done.stdout)
        assert [item["type"] for item in told["output"]] == ["reasoning", "file_search_call", "message"]
        assert (told["status"], told["research"]["answer"], told["research"]["supported"]) == ("completed", "Ada", True)
        assert told["output"][0]["content"][0]["text"] == "hmm" and told["output"][2]["content"][0]["text"] == "Ada"


def _ready(workspace: Workspace) -> bool:
    if not address_file(workspace).is_file():
        return False
    url = json.loads(address_file(workspace).read_text())["url"]
    try:
        return httpx.get(f"{url}/readyz", trust_env=False, timeout=10).is_success
    except httpx.HTTPError:
        return False
