"""Requests go to their server or to the configured proxy, never to one that the environment names: it would read tokens and answers."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import JudgeConfig, TransferConfig
from research_rl.data.sources import TransientError
from research_rl.data.sources.http import Web
from research_rl.data.sources.hub import HubSource
from research_rl.data.sources.s3 import BucketSource
from research_rl.errors import DataError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process import hub
from research_rl.process.services import Endpoint
from research_rl.retriever.client import RetrieverClient
from research_rl.reward.judge import Judge
from research_rl.serving.client import HttpEngine, Sampling
from research_rl.training.run.launch import RayJobs
from research_rl.training.run.remote import Store
from tests.web import recording_proxy

NOBODY = "http://127.0.0.1:9"
"""Where nothing listens: a request that goes straight there fails at once."""
QUIET = TransferConfig(timeout_s=5, attempts=1, hub_endpoint=NOBODY)
Call = Callable[[str | None, Path], Any]


def ask_judge(proxy: str | None, folder: Path) -> None:
    async def once() -> None:
        async with Judge(JudgeConfig(url=NOBODY, attempts=1, proxy=proxy), "m", 100, "secret") as judge:
            assert (await judge.ask("q", ["g"], "a")).correct is None

    asyncio.run(once())


def generate(proxy: str | None, folder: Path) -> None:
    async def once() -> None:
        async with HttpEngine(Endpoint(NOBODY, "secret"), Sampling(), attempts=1) as engine:
            await engine.generate([1], [], 1)

    with pytest.raises(ServiceError):
        asyncio.run(once())


def search(proxy: str | None, folder: Path) -> None:
    async def once() -> None:
        async with RetrieverClient(NOBODY, "secret", 0.5) as client:
            await client.search(["q"], 1)

    asyncio.run(once())


def ask_ray(proxy: str | None, folder: Path) -> None:
    with pytest.raises(ServiceError):
        RayJobs(NOBODY, "secret").info("job")


def read_web(proxy: str | None, folder: Path) -> None:
    with suppress(TransientError, DataError), Web(transfer(proxy), lambda: {"Authorization": "Bearer secret"}).get(f"{NOBODY}/a", {}, "a"):
        pass


def list_hub(proxy: str | None, folder: Path) -> None:
    with pytest.raises((TransientError, DataError)):
        HubSource("owner/data", "main", transfer(proxy)).names()


def fetch_model(proxy: str | None, folder: Path) -> None:
    with pytest.raises(ServiceError, match="does not give owner/model at main"):
        hub.snapshot("owner/model", "main", transfer(proxy), folder)


def read_bucket(proxy: str | None, folder: Path) -> None:
    with pytest.raises((TransientError, DataError)):
        BucketSource("bucket", "x", NOBODY, transfer(proxy)).locate("a")


def upload(proxy: str | None, folder: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    with pytest.raises((BotoCoreError, ClientError)):
        Store.parse("s3://bucket/x", "run", proxy).client().list_buckets()


def transfer(proxy: str | None) -> TransferConfig:
    return QUIET.model_copy(update={"proxy": proxy})


CONFIGURABLE: list[Call] = [ask_judge, read_web, list_hub, fetch_model, read_bucket, upload]
DIRECT: list[Call] = [generate, search, ask_ray]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A proxy that the environment names in every spelling, with nothing exempted from it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    for name, value in {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": NOBODY}.items():
        monkeypatch.setenv(name, value)
    with recording_proxy() as (url, requests):
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, url)
        yield url, requests


@pytest.mark.parametrize("call", [*CONFIGURABLE, *DIRECT])
def test_a_proxy_of_the_environment_sees_no_request(call: Call, proxy: tuple[str, list[str]], tmp_path: Path) -> None:
    call(None, tmp_path)
    assert proxy[1] == []


@pytest.mark.parametrize("call", CONFIGURABLE)
def test_a_configured_proxy_is_used(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: tuple[str, list[str]]) -> None:
    url, requests = proxy
    monkeypatch.setenv("HTTP_PROXY", NOBODY)
    call(url, tmp_path)
    assert requests and all(NOBODY in request.partition("\n")[0] for request in requests)


def test_every_httpx_client_takes_its_options_from_the_one_rule() -> None:
    """Also one that no test above knows. Who asks whether Prefect's own client will reach its server goes the way that client goes."""
    texts = {path: path.read_text() for folder in ("research_rl", "tasks", "flows") for path in (CHECKOUT / folder).rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in texts.items() if any(name in text for name in ("httpx.", "urlopen", "requests."))}
    calls = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call) and _sends(node)]
    astray = [f"{path.relative_to(CHECKOUT)}:{node.lineno}" for path, node in calls if not _by_the_rule(node)]
    assert len(calls) >= 9 and astray == []


def _sends(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    senders = ("Client", "AsyncClient", "get", "post", "put", "request", "stream")
    return name in {*(f"httpx.{sender}" for sender in senders), "urllib.request.urlopen", "urlopen", "requests.get", "requests.post"}


def _by_the_rule(call: ast.Call) -> bool:
    options = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
    return any(option.startswith("httpx_options(") or option == "proxies.environment_options()" for option in options)
