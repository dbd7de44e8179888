"""A real retriever process answers the original's and Search-R1's formats, names what is wrong, and ends cleanly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint, free_port
from research_rl.retriever import command
from research_rl.retriever.client import RetrieverClient
from tests.knowledge import built, passages
from tests.waiting import until

ROWS, SECRET = 250, "a-secret"
LIMITS = {"max_batch": 8, "max_queries": 3000, "max_top_k": 20, "max_query_chars": 100, "max_body_mib": 1, "cache_entries": 50}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return built(tmp_path_factory.mktemp("knowledge"), ROWS, encoder={"dim": 512})


@pytest.fixture(scope="module")
def endpoint(workspace: Workspace) -> Iterator[Endpoint]:
    os.environ[command.TOKEN] = SECRET
    try:
        with command.running(Config.model_validate({"retriever": LIMITS}), workspace) as started:
            yield started
    finally:
        del os.environ[command.TOKEN]
    assert not list(workspace.services.glob("*.pid"))


@pytest.fixture(scope="module")
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, headers={"Authorization": f"Bearer {endpoint.token}"}, trust_env=False, timeout=60) as client:
        yield client


def command_line(workspace: Workspace, *more: str) -> list[str]:
    return [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(workspace.root), *more]


def run(workspace: Workspace, *more: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != command.TOKEN}
    return subprocess.run(command_line(workspace, *more), capture_output=True, text=True, cwd=CHECKOUT, timeout=60, env=env)


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_search_in_the_original_format(http: httpx.Client) -> None:
    documents = post(http, "/search", query="where does Person17 Surname17 live?", top_n=3)
    assert len(documents) == 3
    assert documents[0] == passages(ROWS)[17]
    again, scores = post(http, "/search", query="where does Person17 Surname17 live?", top_n=3, return_score=True)
    assert again == documents
    assert scores == sorted(scores, reverse=True)
    assert len(post(http, "/search", query="Person17")) == 10


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batch_search_in_the_original_format(http: httpx.Client, count: int) -> None:
    queries = [f"Person{n} Surname{n}" for n in range(count)]
    plain = post(http, "/batch_search", query=queries, top_n=2)
    documents, scores = post(http, "/batch_search", query=queries, top_n=2, return_score=True)
    assert documents == plain
    assert [found[0]["id"] for found in plain] == [f"p{n}" for n in range(count)]
    assert [len(row) for row in scores] == [2] * count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_retrieve_as_search_r1_asks(http: httpx.Client, count: int) -> None:
    queries = [f"Person{n} Surname{n}" for n in range(count)]
    result = post(http, "/retrieve", queries=queries, topk=2, return_scores=True)["result"]
    assert [found[0]["document"]["contents"] for found in result] == [passages(ROWS)[n]["contents"] for n in range(count)]
    assert all(isinstance(hit["score"], float) for found in result for hit in found)
    plain = post(http, "/retrieve", queries=queries)["result"]
    assert [found[0]["id"] for found in plain] == [f"p{n}" for n in range(count)]
    assert [len(found) for found in plain] == [3] * count


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/search", {"query": " \n"}, 400, "blank"),
        ("/search", {"query": "\u200b\u2060"}, 400, "blank"),
        ("/search", {"query": "a", "top_n": 21}, 422, "top_n=21 exceeds retriever.max_top_k=20"),
        ("/search", {"query": "a", "top_n": 0}, 422, "top_n=0"),
        ("/retrieve", {"queries": ["a"], "topk": 0}, 422, "topk=0 is no whole number of passages from 1 on"),
        ("/search", {"query": "a", "top_n": True}, 422, "top_n=True is no whole number"),
        ("/search", {"query": "a", "top_n": 3, "topk": 4}, 422, "top_n and topk differ; send one of them"),
        ("/search", {"query": 5}, 422, "query=5"),
        ("/search", {}, 422, "query"),
        ("/batch_search", {"query": "a"}, 422, "query=a"),
        ("/batch_search", {"query": ["a"] * 3001}, 413, "3001 queries exceed retriever.max_queries=3000"),
        ("/retrieve", {"queries": ["x" * 1_100_000]}, 413, "the limit is retriever.max_body_mib=1"),
        ("/retrieve", {"topk": 3}, 422, "send the texts as `queries`"),
        ("/search", {"query": "a", "timeout_s": 0}, 422, "timeout_s=0"),
    ],
)
def test_a_request_past_a_limit_is_told_value_limit_and_remedy(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    response = http.post(path, json=body)
    assert (response.status_code, says in response.json()["detail"]) == (status, True), response.text


def test_a_blank_query_costs_the_others_of_its_request_nothing(http: httpx.Client) -> None:
    """ReSearch and Search-R1 send whatever the model wrote, and a request that fails ends their training."""
    for blank in ("", " \n", "\u200b\u2060\ufeff"):
        documents, scores = post(http, "/batch_search", query=["Person3 Surname3", blank], top_n=2, return_score=True)
        assert [len(row) for row in documents] == [len(row) for row in scores] == [2, 0] and documents[0][0]["id"] == "p3"
        result = post(http, "/retrieve", queries=[blank, "Person4 Surname4"], topk=2, return_scores=True)["result"]
        assert [len(row) for row in result] == [0, 2] and result[1][0]["document"]["id"] == "p4"


def test_as_many_queries_as_search_r1_sends_at_once_are_answered_in_order(http: httpx.Client) -> None:
    """512 prompts of 5 rollouts; the service searches them 8 at a time, and one of them is blank."""
    queries = [f"Person{n % ROWS} Surname{n % ROWS}" for n in range(2560)]
    queries[1000] = ""
    result = post(http, "/retrieve", queries=queries, topk=3, return_scores=True)["result"]
    assert [row[0]["document"]["id"] if row else None for row in result] == [None if n == 1000 else f"p{n % ROWS}" for n in range(2560)]


def test_a_query_past_the_limit_is_cut_and_counted(http: httpx.Client) -> None:
    before = metric(http, "retriever_shortened_queries_total")
    long = "Person6 Surname6 " + "x" * 20_000
    assert post(http, "/search", query=long, top_n=1)[0]["id"] == "p6"
    assert post(http, "/batch_search", query=[long, "Person7 Surname7"], top_n=1)[1][0]["id"] == "p7"
    assert metric(http, "retriever_shortened_queries_total") >= before + 2


@pytest.mark.parametrize("count", ["3", 3.0, " 3 ", 3])
@pytest.mark.parametrize("name", ["top_n", "topk", "top_k"])
def test_a_number_of_passages_is_read_in_every_form_and_name_that_peers_send(http: httpx.Client, count: Any, name: str) -> None:
    assert len(post(http, "/search", query="Person1", **{name: count})) == 3
    assert [len(row) for row in post(http, "/batch_search", query=["Person1"], **{name: count})] == [3]
    assert [len(row) for row in post(http, "/retrieve", queries=["Person1"], **{name: count})["result"]] == [3]


def test_a_body_without_a_length_is_read(http: httpx.Client) -> None:
    pieces = iter([b'{"query": "Person5 ', b'Surname5", "top_n": 1}'])
    answer = http.post("/search", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    assert (answer.status_code, answer.json()[0]["id"]) == (200, "p5")
    large = http.post("/search", content=(b"x" * 65_536 for _ in range(40)), headers={"Content-Type": "application/json"})
    assert (large.status_code, "max_body_mib=1" in large.text) == (413, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:99"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_web_pages_of_other_sites_are_refused_whatever_name_they_use(http: httpx.Client, headers: dict[str, str], status: int) -> None:
    answers = [http.post("/search", json={"query": "Person1"}, headers=headers), http.get("/health", headers=headers)]
    assert [answer.status_code for answer in answers] == [status] * 2, answers[0].text
    if status != 200:
        assert answers[0].json()["detail"]


def test_a_retriever_of_another_index_is_refused_with_both_hashes(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = built(tmp_path, 120, encoder={"dim": 64})
    config = Config.model_validate({"retriever": {"url": endpoint.url}})
    monkeypatch.setenv(command.TOKEN, SECRET + "\n")  # as a file's content has it
    expected = manifest.load(other.folder("index")).hash[:12]
    with (
        pytest.raises(ServiceError, match=rf"serves index [0-9a-f]{{12}}, but .* is {expected}; restart it"),
        command.running(config, other),
    ):
        pass


def test_a_wrong_token_is_named_as_such(endpoint: Endpoint, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"retriever": {"url": endpoint.url}})
    monkeypatch.setenv(command.TOKEN, "another")
    with pytest.raises(ServiceError, match="401: the bearer token is missing or wrong"), command.running(config, workspace):
        pass
    monkeypatch.setenv(command.TOKEN, "geheim-ü")
    with pytest.raises(ConfigError, match=rf"{command.TOKEN} has the character U\+00FC .*ASCII"), command.running(config, workspace):
        pass


def test_retrieve_takes_one_query_as_text(http: httpx.Client) -> None:
    for body in ({"queries": "Person5 Surname5"}, {"query": "Person5 Surname5"}, {"query": ["Person5 Surname5"]}):
        (found,) = post(http, "/retrieve", **body)["result"]
        assert found[0]["id"] == "p5"


def test_a_request_past_its_deadline_is_not_searched(http: httpx.Client) -> None:
    before = metric(http, "retriever_deadline_misses_total")
    late = http.post("/search", json={"query": "never searched"}, headers={"X-Deadline-Ms": "0"})
    assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
    assert "past its deadline" in late.json()["detail"]
    assert metric(http, "retriever_deadline_misses_total") == before + 1
    assert http.post("/search", json={"query": "q"}, headers={"X-Deadline-Ms": "soon"}).status_code == 422
    assert http.post("/search", json={"query": "q", "timeout_s": 5.0}, headers={"X-Deadline-Ms": "5000"}).status_code == 200


def test_a_repeated_query_comes_from_the_cache_whatever_its_blanks(http: httpx.Client) -> None:
    first = post(http, "/search", query="Person31 Surname31", top_n=2)
    hits, batches = metric(http, "retriever_cache_hits_total"), metric(http, "retriever_batch_queries_count")
    assert post(http, "/search", query="  Person31 \n Surname31 ", top_n=2) == first
    assert metric(http, "retriever_cache_hits_total") == hits + 1
    assert metric(http, "retriever_batch_queries_count") == batches
    again = post(http, "/batch_search", query=["Person31 Surname31", "Person32 Surname32"], top_n=2)
    assert [found[0]["id"] for found in again] == ["p31", "p32"]
    assert len(post(http, "/search", query="Person31 Surname31", top_n=3)) == 3


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").raise_for_status().text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_metrics_count_requests_refusals_and_batches(http: httpx.Client, endpoint: Endpoint) -> None:
    before = {name: metric(http, name) for name in ("retriever_requests_total", "retriever_queries_total", "retriever_refusals_total")}
    post(http, "/batch_search", query=["one query", "two queries", "three queries"], top_n=1)
    assert httpx.get(f"{endpoint.url}/metrics", trust_env=False).status_code == 401
    httpx.get(f"{endpoint.url}/no/such/{'x' * 50}", trust_env=False)
    assert metric(http, "retriever_queries_total") == before["retriever_queries_total"] + 3
    assert metric(http, "retriever_refusals_total") == before["retriever_refusals_total"] + 2
    text = http.get("/metrics").text
    assert 'route="/batch_search",status="200"' in text and 'route="other"' in text and "no/such" not in text
    assert metric(http, "retriever_ready") == 1 and metric(http, "retriever_queue_queries") == 0


def test_the_interface_describes_itself(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/search", "/batch_search", "/retrieve", "/health", "/readyz", "/metrics", "/info"}
    assert {"400", "413", "422", "503"} < set(paths["/search"]["post"]["responses"])
    assert paths["/search"]["post"]["summary"] == "Passages for one query."


def test_the_page_of_the_interface_needs_no_other_site_and_no_token(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url, trust_env=False) as browser:
        page = browser.get("/docs").text
        files = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(files) >= 3 and all(name.startswith("/") for name in files), files
        assert {name: browser.get(name).status_code for name in files} == dict.fromkeys(files, 200)
        assert browser.get("/openapi.json").json()["security"] == [{"token": []}], "the page could not send the token"
        assert browser.post("/docs").status_code == 401


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b'{"query": "\\ud800"}', b'{"query": "a", "top_n": "\\ud800"}', b'{"query": NaN}', b"[" * 5000]
)
def test_malformed_bodies_are_refused_not_fatal(http: httpx.Client, body: bytes) -> None:
    response = http.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert "detail" in response.json()


def test_health_needs_no_token_and_all_else_does(http: httpx.Client, endpoint: Endpoint, workspace: Workspace) -> None:
    bare = httpx.get(f"{endpoint.url}/health", trust_env=False)
    assert bare.json() == {"status": "healthy", "retrievers": {"total": 1, "available": 1}}
    for token in ("", "Bearer wrong", SECRET):
        refused = httpx.post(f"{endpoint.url}/search", json={"query": "a"}, headers={"Authorization": token}, trust_env=False)
        assert refused.status_code == 401
    hashes = {name: manifest.load(workspace.folder(name)).hash for name in ("corpus", "embed", "index")}
    assert http.get("/info").json()["manifests"] == hashes


def test_concurrent_clients_each_get_their_own_answer(http: httpx.Client) -> None:
    def ask(n: int) -> str:
        return post(http, "/search", query=f"Person{n} Surname{n}", top_n=1 + n % 5)[0]["id"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(200))) == [f"p{n}" for n in range(200)]


def test_a_reply_does_not_wait_for_the_networks_small_packet_delay(http: httpx.Client) -> None:
    """40 ms a reply when Nagle's algorithm is left on; the best of many keeps a busy machine out of it."""
    post(http, "/search", query="warm")
    best = 1.0
    for n in range(20):
        started = time.perf_counter()
        post(http, "/search", query=f"Person{n}")
        best = min(best, time.perf_counter() - started)
    assert best < 0.035


def test_the_client_speaks_to_the_service(endpoint: Endpoint) -> None:
    async def check() -> None:
        async with RetrieverClient(endpoint.url, endpoint.token) as client:
            found = await client.search(["Person3 Surname3", "Person9 Surname9"], 4)
            assert isinstance(found, list)
            assert [row[0].id for row in found] == ["p3", "p9"]
            assert [len(row) for row in found] == [4, 4]
            assert found[0][0].score > found[0][1].score
            idle = {"status": "healthy", "retrievers": {"total": 1, "available": 1}}
            async with asyncio.timeout(10):  # the worker may still be putting the batch away that it has just answered
                while await client.health() != idle:
                    await asyncio.sleep(0.01)

    asyncio.run(check())


def test_a_port_in_use_is_told_in_one_line(workspace: Workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(workspace, "--port", str(port))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"retriever.port={port}" in done.stderr
        with (
            pytest.raises(ServiceError, match=f"retriever.port={port}"),
            command.running(Config.model_validate({"retriever": {"port": port}}), workspace),
        ):
            pass


def test_outside_addresses_need_a_token(workspace: Workspace) -> None:
    done = run(workspace, "--host", "0.0.0.0")
    assert (done.returncode, command.TOKEN in done.stderr) == (1, True)


def test_an_outside_address_without_a_token_warns_and_answers_whoever_asks(workspace: Workspace, tmp_path: Path) -> None:
    """`auth: none` is for clients that cannot send a token; that the service is open has to stand in its log."""
    with serving(workspace, tmp_path / "log", host="0.0.0.0", auth="none") as (_, url):
        found = httpx.post(f"{url}/search", json={"query": "Person17", "top_n": 2}, trust_env=False, timeout=60)
        assert (found.status_code, len(found.json())) == (200, 2)
    warning = "retriever: warning: retriever.auth=none: 0.0.0.0 answers whoever reaches it; limit that by retriever.allow"
    assert warning in (tmp_path / "log.errors").read_text().splitlines()


def test_an_index_of_another_corpus_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    made = built(tmp_path, 120, encoder={"dim": 64})
    shutil.rmtree(made.folder("index"))
    shutil.copytree(workspace.folder("index"), made.folder("index"))
    done = run(made, "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "was built from embed" in done.stderr


def test_sigterm_ends_it_and_start_is_quick_without_torch(workspace: Workspace) -> None:
    started = time.monotonic()
    with subprocess.Popen(command_line(workspace, "--port", "0"), stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout
        line = next(line for line in process.stdout if "passages at" in line)
        seconds = time.monotonic() - started
        mapped = {Path(entry.path).name for entry in psutil.Process(process.pid).memory_maps()}
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
    assert json.dumps(f"{ROWS} passages at http://127.0.0.1:")[1:-1] in line
    assert not any(name.startswith("libtorch") for name in mapped)
    assert seconds < 60, f"{seconds:.1f} s; 3 s is the aim on a free machine"


@contextmanager
def serving(workspace: Workspace, log: Path, **config: Any) -> Generator[tuple[subprocess.Popen[bytes], str]]:
    """Run a service of its own and yield it with its address; its lines go to `log`, its errors beside it."""
    given = json.dumps({"port": free_port(), **config})
    env = {name: value for name, value in os.environ.items() if name != command.TOKEN}
    call = command_line(workspace, "--config", given)
    with (
        log.open("wb") as stream,
        log.with_name(f"{log.name}.errors").open("wb") as errors,
        subprocess.Popen(call, stdout=stream, stderr=errors, cwd=CHECKOUT, env=env) as process,
    ):
        try:
            url = f"http://127.0.0.1:{json.loads(given)['port']}"
            wait_ready(url)
            yield process, url
        finally:
            process.kill()


def wait_ready(url: str) -> list[int]:
    """Wait for 200 from /readyz; return the statuses seen before."""
    seen: list[int] = []

    def ready() -> bool:
        try:
            seen.append(httpx.get(f"{url}/readyz", trust_env=False).status_code)
        except httpx.TransportError:
            seen.append(0)
        return seen[-1] == 200

    assert until(ready, pause_s=0.01), f"{url} is not ready: {seen[-5:]}"
    return seen[:-1]


@pytest.mark.parametrize("log_queries", [False, True])
def test_the_log_is_json_and_holds_no_query_unless_told_to(workspace: Workspace, tmp_path: Path, log_queries: bool) -> None:
    with serving(workspace, tmp_path / "log", log_queries=log_queries) as (process, url):
        with httpx.Client(base_url=url, trust_env=False) as client:
            post(client, "/batch_search", query=["secret words", "others"], top_n=3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["route"] == "/batch_search"]
    assert (line["status"], line["queries"], line["k"], line["batch"], line["cached"]) == (200, 2, 3, 2, 0)
    assert line["ms"] > 0 and abs(line["time"] - time.time()) < 600
    assert ("secret words" in (tmp_path / "log").read_text()) is log_queries


def test_it_is_not_ready_before_the_canary_and_not_while_it_drains(workspace: Workspace, tmp_path: Path) -> None:
    """A request whose body is still on its way is answered after SIGTERM; a new one is refused with 503 and Retry-After."""
    with serving(workspace, tmp_path / "log") as (process, url):
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        body = b'{"query": "Person8 Surname8"}'
        head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as slow:
            slow.sendall(head + body[:5])
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
            refused = httpx.post(f"{url}/search", json={"query": "q"}, trust_env=False)
            assert (refused.status_code, refused.headers["Retry-After"], refused.headers["Connection"]) == (503, "1", "close")
            slow.sendall(body[5:])
            answer = slow.makefile("rb").readline()
        assert answer.startswith(b"HTTP/1.1 200")
        assert process.wait(15) in (0, -signal.SIGTERM)


def test_what_was_not_answered_within_the_time_to_drain_is_given_up(workspace: Workspace, tmp_path: Path) -> None:
    """A sender that never ends its request must not keep the service from ending, nor make it end at once."""
    with serving(workspace, tmp_path / "log", drain_s=2.0) as (process, url):
        head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as slow:
            slow.sendall(head)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            assert process.wait(60) in (0, -signal.SIGTERM)
        assert 1.9 < time.monotonic() - asked < 8.0


def test_whoever_starts_a_service_gives_it_longer_than_its_time_to_drain(workspace: Workspace, tmp_path: Path) -> None:
    """It was killed 10 s after it was asked to end, whatever retriever.drain_s said."""
    config = Config.model_validate({"retriever": {"drain_s": 600.0}})
    process = command.launch(config, workspace, free_port(), folder=tmp_path)
    try:
        assert process.grace_s > 600.0
        (guardian,) = [each for each in psutil.Process().children() if each.pid == process.popen.pid]
        # The kernel shows no environment yet in the moment in which a program replaces the one that started it.
        assert until(lambda: float(guardian.environ().get("RESEARCH_GRACE_S", 0)) > 600.0)
    finally:
        process.stop()


def test_a_given_url_is_used_when_it_answers(workspace: Workspace, endpoint: Endpoint) -> None:
    with command.running(Config.model_validate({"retriever": {"url": endpoint.url}}), workspace) as found:
        assert found == endpoint
    dead = Config.model_validate({"retriever": {"url": "http://127.0.0.1:9"}})
    with pytest.raises(ServiceError, match=r"retriever.url=http://127.0.0.1:9 does not answer"), command.running(dead, workspace):
        pass
