"""A running retriever comes to a newer index by itself: no request is lost or answered from two, and it says which one it serves."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from research_rl.config import RetrieverConfig
from research_rl.embedding import build as embed
from research_rl.errors import ManifestError
from research_rl.index import build as index
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN
from research_rl.retriever.retriever import Retriever
from tests.knowledge import context, passages, snapshot, until_ready
from tests.waiting import until

ROWS, TREE = 240, {"encoder": {"dim": 256}, "index": {"factory": "Exact", "shard_rows": 100}}
QUERIES = [f"Person{n} Surname{n}" for n in range(0, ROWS, 3)]
CLIENTS = 4
# No results are held, and a request takes ten searches: the exchange falls into the middle of some.
CONFIG = {"follow_s": 0.1, "cache_entries": 0, "max_batch": 8, "warm": False, "log_requests": False}


def edition(number: int) -> list[dict[str, str]]:
    """Passages that each say of which edition they are; the newer ones lack the first ten."""
    rows = passages(ROWS)[10 if number else 0 :]
    return [{**row, "contents": f"{row['contents']} Edition{number}."} for row in rows]


def build(root: Path, number: int) -> Workspace:
    workspace = snapshot(root, edition(number))
    embed.run(context("embed", root, **TREE))
    index.run(context("index", root, **TREE))
    return workspace


@contextmanager
def serving(workspace: Workspace, **config: Any) -> Generator[str]:
    port = free_port()
    call = ["-m", "research_rl.retriever.command", "--workspace", str(workspace.root)]
    call += ["--config", json.dumps({**CONFIG, "port": port, **config})]
    env = {name: value for name, value in os.environ.items() if name != TOKEN}
    process = subprocess.Popen([sys.executable, *call], cwd=CHECKOUT, env=env, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until_ready(process, url)
        yield url
    finally:
        process.kill()
        process.wait()


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(f"{url}{path}", trust_env=False, timeout=60)


def served(url: str) -> str:
    return get(url, "/info").json()["manifests"]["index"]


def metric(url: str, name: str) -> list[str]:
    return [line for line in get(url, "/metrics").text.splitlines() if line.startswith(f"retriever_{name}")]


def standing(workspace: Workspace) -> str:
    return manifest.load(workspace.folder("index"), verify=False).hash


def editions(found: list[list[dict[str, str]]]) -> set[str]:
    """Return of which editions the passages of a reply are: each text ends with its own."""
    return {passage["contents"].split()[-1] for passages in found for passage in passages}


def newest(url: str) -> set[str]:
    """Return of which editions the passages are that a new client gets."""
    return editions(httpx.post(f"{url}/batch_search", json={"query": QUERIES, "top_n": 3}, trust_env=False, timeout=60).json())


async def asked(url: str, over: asyncio.Event) -> list[set[str]]:
    """Ask until `over` and once more; return of which editions the passages of each reply are. Any answer but a reply is an error."""
    seen: list[set[str]] = []
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        last = False
        while not last:
            last = over.is_set()
            response = await client.post("/batch_search", json={"query": QUERIES, "top_n": 3})
            assert response.status_code == 200, response.text
            found = response.json()
            assert len(found) == len(QUERIES)
            seen.append(editions(found))
    return seen


async def exchanged(workspace: Workspace, url: str, times: int) -> list[set[str]]:
    """Build one edition after the other while clients ask; return what they saw."""
    over = asyncio.Event()
    clients = [asyncio.create_task(asked(url, over)) for _ in range(CLIENTS)]
    try:
        for number in range(1, times + 1):
            await asyncio.to_thread(build, workspace.root, number)
            there = await asyncio.to_thread(until, lambda: served(url) == standing(workspace))
            assert there, get(url, "/info").text
    finally:
        over.set()
    return [seen for client in clients for seen in await client]


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_ask_all_the_while_lose_no_request(tmp_path: Path, workers: int) -> None:
    workspace = build(tmp_path, 0)
    with serving(workspace, workers=workers) as url:
        first = standing(workspace)
        assert metric(url, "index_info") == [f'retriever_index_info{{index="{first[:12]}"}} 1.0']
        seen = asyncio.run(exchanged(workspace, url, 3))
        # Each reply is of one edition as a whole. A worker of the index before answers on the connections that it has, so that clients
        # which kept theirs may not have seen the last one; who comes anew does.
        assert all(len(each) == 1 for each in seen)
        assert "Edition0." in set.union(*seen)
        assert workers > 1 or "Edition3." in set.union(*seen)
        assert until(lambda: newest(url) == {"Edition3."})
        info = get(url, "/info").json()
        assert (info["switches"], info["failed"], info["rows"]) == (3, None, ROWS - 10)
        # Workers of the index before say what they serve until their last connection ended.
        assert workers == 1 or until(lambda: len(metric(url, "index_info")) == 1)
        assert metric(url, "index_info") == [f'retriever_index_info{{index="{standing(workspace)[:12]}"}} 1.0']
        assert metric(url, "index_switches") == ["retriever_index_switches 3.0"]
        assert metric(url, "index_stale") == ["retriever_index_stale 0.0"]
        # A passage that was removed answers nothing.
        found = httpx.post(f"{url}/search", json={"query": "Person3 Surname3", "top_n": 5}, trust_env=False).json()
        assert "p3" not in {passage["id"] for passage in found}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_that_cannot_be_opened_leaves_the_one_in_service(tmp_path: Path, workers: int) -> None:
    workspace = build(tmp_path, 0)
    with serving(workspace, workers=workers) as url:
        first = standing(workspace)
        build(tmp_path, 1)
        # Whole by its manifest, but not what the retriever can open: the embeddings' encoder is gone.
        with manifest.publish(workspace.folder("embed"), "embed", "x", {"corpus": manifest.load(workspace.folder("corpus"))}) as staging:
            staging.counts["dim"] = 256
            staging.facts |= {"encoder": {"kind": "none"}, "canaries": []}
        parents = {name: manifest.load(workspace.folder(name)) for name in ("corpus", "embed")}
        facts = manifest.load(workspace.folder("index"))
        with manifest.publish(workspace.folder("index"), "index", "x", parents) as staging:
            staging.counts |= facts.counts
            staging.facts |= facts.facts
        # It may have looked when the index before this one stood, and could not open that one either: its parents were gone by then.
        assert until(lambda: (get(url, "/info").json()["failed"] or {}).get("index") == standing(workspace))
        failed = get(url, "/info").json()["failed"]
        assert failed["index"] == standing(workspace) and failed["reason"]
        assert served(url) == first and get(url, "/readyz").status_code == 200
        assert metric(url, "index_stale") == ["retriever_index_stale 1.0"]
        assert metric(url, "index_failed_switches") != ["retriever_index_failed_switches 0.0"]
        found = httpx.post(f"{url}/search", json={"query": "Person3 Surname3", "top_n": 1}, trust_env=False).json()
        assert found[0]["contents"].endswith("Edition0.")
        # What can be opened is taken into service, after whatever failed.
        build(tmp_path, 2)
        assert until(lambda: served(url) == standing(workspace))
        assert get(url, "/info").json()["failed"] is None


def test_a_retriever_that_does_not_follow_stays(tmp_path: Path) -> None:
    workspace = build(tmp_path, 0)
    with serving(workspace, follow_s=0) as url:
        first = standing(workspace)
        build(tmp_path, 1)
        assert metric(url, "index_stale") == ["retriever_index_stale 1.0"] and served(url) == first
        # Shards of passages that were not read before the corpus was replaced are still those of the index.
        found = httpx.post(f"{url}/batch_search", json={"query": QUERIES, "top_n": 1}, trust_env=False, timeout=60).json()
        assert {passages[0]["contents"].split()[-1] for passages in found} == {"Edition0."}


def test_folders_that_are_replaced_while_they_are_opened_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = build(tmp_path, 0)
    check = Retriever._check_canary

    def replaced(self: Retriever, canary: dict[str, Any]) -> None:
        check(self, canary)
        build(tmp_path, 1)

    monkeypatch.setattr(Retriever, "_check_canary", replaced)
    with pytest.raises(ManifestError, match=r"was replaced by [0-9a-f]{12} while [0-9a-f]{12} was opened; open it again"):
        Retriever.open(workspace, RetrieverConfig(warm=False))
