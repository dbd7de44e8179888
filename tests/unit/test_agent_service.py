"""The agent's service answers in both formats, within its limits, to those who may ask, and ends an episode with its client."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from answering import DONE, HEADERS, MILL, OTHER, THINK, TOKEN, Agent, Shelf, listening, until
from hypothesis import given, settings
from hypothesis import strategies as st

from research_rl.agent import answering, page
from research_rl.agent.rounds import rounds
from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ServiceError

QUESTION = {"input": "Who founded Aldmoor Mill?"}
CHAT = {"messages": [{"role": "user", "content": "Who founded Aldmoor Mill?"}]}
NEWS = {"trust_env": False, "timeout": 60.0}


def events(text: str) -> list[dict[str, Any]]:
    """Return the JSON events of a stream, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


@contextmanager
def sent(url: str, path: str, body: dict[str, Any], missing: int = 0) -> Generator[None]:
    """Send a request, all but its last `missing` bytes, on a connection that is closed at the end of the block."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()[: -missing or None])
        yield


def output(response: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [item for item in response["output"] if item["type"] == kind]


def test_a_response_holds_thoughts_searches_answer_and_where_it_stands() -> None:
    agent = Agent()
    reply = agent(body=QUESTION)
    response = reply.json()
    assert reply.status_code == 200 and response["status"] == "completed" and response["model"] == "policy-test"
    assert [item["type"] for item in response["output"]] == ["reasoning", "file_search_call", "reasoning", "message"]
    assert [item["content"][0]["text"] for item in output(response, "reasoning")] == ["I look it up.", "It was Ada."]
    assert agent.shelf.queries == ["who founded Aldmoor Mill"] == output(response, "file_search_call")[0]["queries"]
    assert [result["file_id"] for result in output(response, "file_search_call")[0]["results"]] == ["p1", "p2"]
    text = output(response, "message")[0]["content"][0]
    assert text["text"] == "It is Ada King"
    [cited] = response["research"]["citations"]
    assert MILL.contents[cited["start"] : cited["end"]] == "Ada King" == cited["text"] == response["research"]["answer"]
    assert (cited["passage_id"], cited["search"], cited["rank"], cited["read"]) == ("p1", 0, 0, True)
    assert response["research"]["supported"] is True and response["research"]["stop_reason"] == "answered"
    assert text["annotations"][0]["type"] == "file_citation" and text["annotations"][0]["filename"] == "Aldmoor Mill"


def test_usage_counts_what_was_read_and_what_was_written() -> None:
    usage = Agent()(body=QUESTION).json()["usage"]
    shown = f" <result>\n{MILL.contents}\n\n{OTHER.contents}\n</result>"
    assert usage["input_tokens"] == len(QUESTION["input"].encode()) + len(shown.encode())
    assert usage["output_tokens"] == len(THINK.encode()) + len(DONE.encode())
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_stream_tells_the_same_as_the_whole_in_order_and_without_gaps() -> None:
    agent = Agent()
    told = events(agent(body={**QUESTION, "stream": True}).text)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    kinds = [event["type"].removeprefix("response.") for event in told]
    milestones = [kind for kind in dict.fromkeys(kinds)]
    assert milestones[:5] == ["created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"]
    order = ["reasoning_text.done", "file_search_call.searching", "file_search_call.completed", "output_text.delta"]
    order += ["output_text.annotation.added", "output_text.done", "completed"]
    places = [kinds.index(kind) for kind in order]
    assert places == sorted(places) and kinds[-1] == "completed"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    whole = told[-1]["response"]
    for event in told:
        if event["type"] in ("response.reasoning_text.done", "response.output_text.done"):
            deltas = "".join(e["delta"] for e in told if e.get("item_id") == event["item_id"] and "delta" in e)
            assert deltas == event["text"] == whole["output"][event["output_index"]]["content"][0]["text"]
    assert [{**item, "id": ""} for item in whole["output"]] == [{**item, "id": ""} for item in agent(body=QUESTION).json()["output"]]


def test_a_chat_completion_holds_the_answer_and_beside_it_how_it_came_about() -> None:
    reply = Agent()("/v1/chat/completions", CHAT).json()
    [choice] = reply["choices"]
    assert choice["message"]["content"] == "It is Ada King" and choice["finish_reason"] == "stop"
    assert "I look it up." in choice["message"]["reasoning_content"] and "search: who founded" in choice["message"]["reasoning_content"]
    assert reply["citations"] == ["p1"] and reply["search_results"][0]["results"][0]["text"] == MILL.contents
    assert reply["research"]["supported"] is True and reply["usage"]["total_tokens"] > 0


def test_a_chat_stream_says_the_same_and_tells_usage_only_when_asked_to() -> None:
    agent = Agent()
    chunks = events(agent("/v1/chat/completions", {**CHAT, "stream": True}).text)
    message = agent("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop" and chunks[-1]["citations"] == ["p1"]
    assert not any("usage" in chunk for chunk in chunks)
    asked = events(agent("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_searches": 4}, "max_searches=4 exceeds the server's episode.max_searches=3"),
        ({"top_k": 9}, "top_k=9 exceeds the server's episode.top_k=3"),
        ({"wall_s": 601}, "wall_s=601 exceeds the server's episode.wall_s=600"),
        ({"input": " "}, "is blank"),
        ({"input": []}, "no message of the role user"),
        ({"input": "x" * 4001}, "4,001 characters, agent.max_question_chars is 4,000"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
        ({"input": [{"role": "user", "content": 7}]}, "neither a text nor a list"),
        ({"previous_response_id": "resp_1"}, "keeps no responses"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_value_and_limit(body: dict[str, Any], words: str) -> None:
    agent = Agent()
    reply = agent(body={**QUESTION, **body})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]
    assert not agent.policy.began.is_set(), "an episode began"


def test_a_request_may_ask_for_less() -> None:
    agent = Agent()
    fewer = agent(body={**QUESTION, "top_k": 1}).json()
    assert [result["file_id"] for result in output(fewer, "file_search_call")[0]["results"]] == ["p1"]
    none = agent(body={**QUESTION, "max_searches": 0}).json()
    assert none["status"] == "incomplete" and none["incomplete_details"] == {"reason": "search_limit"}
    assert output(none, "file_search_call") == [] and none["research"]["answer"] is None and none["research"]["supported"] is None
    # The query that was not searched for is told as what the policy wrote.
    assert "who founded Aldmoor Mill" in output(none, "reasoning")[0]["content"][0]["text"]
    short = agent(body={**QUESTION, "max_output_tokens": 20}).json()
    assert short["incomplete_details"] == {"reason": "max_output_tokens"}
    assert agent("/v1/chat/completions", {**CHAT, "max_tokens": 20}).json()["choices"][0]["finish_reason"] == "length"


def test_the_time_of_a_request_ends_its_episode() -> None:
    agent = Agent()
    agent.policy.holds = threading.Event()
    response = agent(body={**QUESTION, "wall_s": 0.2}).json()
    assert response["incomplete_details"] == {"reason": "time_limit"} and agent.policy.cancelled.is_set()
    assert agent.service.active == 0


def test_the_last_message_of_the_user_is_the_question() -> None:
    agent = Agent()
    parts = [{"type": "text", "text": "Who founded"}, {"type": "text", "text": "the mill?"}]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "before"}, {"role": "assistant", "content": "b"}]
    reply = agent("/v1/chat/completions", {"messages": [*turns, {"role": "user", "content": parts}], "temperature": 0.7}).json()
    assert reply["research"]["ignored_messages"] == 3
    assert reply["usage"]["prompt_tokens"] > len("Who founded\nthe mill?")


def test_only_the_served_model_is_answered_for() -> None:
    agent = Agent()
    names = [model["id"] for model in agent("/v1/models").json()["data"]]
    assert names == ["research-agent", "policy-test"], "clients that take the first name keep one that lasts"
    for name in names:
        assert agent(body={**QUESTION, "model": name}).json()["model"] == "policy-test", "an answer names the model that gave it"
    refused = agent(body={**QUESTION, "model": "gpt-4o"})
    assert refused.status_code == 404 and "ask for one of research-agent and policy-test" in refused.json()["error"]["message"]
    assert agent("/v1/chat/completions", {**CHAT, "n": 2}).status_code == 400


def test_a_model_server_that_dies_in_mid_answer_is_told_and_the_next_question_works() -> None:
    agent = Agent()
    agent.policy.fails = ServiceError("http://10.1.2.3:99 broke off")
    told = events(agent(body={**QUESTION, "stream": True}).text)
    assert told[-1]["type"] == "response.failed" and told[-1]["response"]["error"]["code"] == "server_error"
    assert "the model server failed" in told[-1]["response"]["error"]["message"] and "10.1.2.3" not in json.dumps(told)
    assert any("delta" in event for event in told), "what came before was not told"
    assert told[-1]["response"]["output"][-1]["status"] == "incomplete", "what was being written is as unfinished as the response"
    assert events(agent("/v1/chat/completions", {**CHAT, "stream": True}).text)[-1]["error"]["type"] == "server_error"
    assert agent(body=QUESTION).status_code == agent("/v1/chat/completions", CHAT).status_code == 502
    agent.policy.fails = None
    assert agent(body=QUESTION).json()["status"] == "completed" and agent.service.active == 0


def test_a_retriever_that_died_is_told_in_the_search_and_the_policy_goes_on() -> None:
    agent = Agent(shelf=Shelf(failure=SearchFailure("retriever cannot be reached", SearchFault.UNREACHABLE)))
    response = agent(body=QUESTION).json()
    [search] = output(response, "file_search_call")
    assert (search["status"], search["error"], search["results"]) == ("failed", "retriever cannot be reached", [])
    assert response["status"] == "completed" and response["research"]["failed_searches"] == 1
    assert response["research"]["supported"] is False and response["research"]["citations"] == []


def test_a_passage_that_was_cut_off_before_the_answer_supports_nothing() -> None:
    response = Agent(episode={"max_result_tokens": 20})(body=QUESTION).json()
    assert [cited["read"] for cited in response["research"]["citations"]] == [False]
    assert response["research"]["supported"] is False


def test_questions_and_passages_in_any_script() -> None:
    passage = Passage("花", "桥\n这座桥由李四于1920年建造。🌉")
    agent = Agent("<search>谁造了桥</search>", "<answer>\\boxed{李四}</answer>$", shelf=Shelf(passage))
    response = agent(body={"input": "谁造了这座桥？🌉"}).json()
    [cited] = response["research"]["citations"]
    assert passage.contents[cited["start"] : cited["end"]] == "李四" and output(response, "message")[0]["content"][0]["text"] == "李四"
    assert events(agent(body={"input": "谁？", "stream": True}).text)[-1]["response"]["research"]["answer"] == "李四"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    "input",
    "messages",
    "model",
    "stream",
    "n",
    "max_tokens",
    "max_output_tokens",
    "top_k",
    "max_searches",
    "wall_s",
    "stream_options",
]
BODIES = st.dictionaries(st.sampled_from([*NAMES, "role", "content"]), JSON, max_size=6).map(json.dumps).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from(["/v1/responses", "/v1/chat/completions"]), content=st.binary(max_size=40) | BODIES | st.just(b"[" * 5000))
def test_no_body_makes_an_unforeseen_error(path: str, content: bytes) -> None:
    agent = FUZZED
    reply = agent(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert agent.service.active == agent.service.requests == agent.source.leased == 0


FUZZED = Agent("<answer>\\boxed{a}</answer>$")


def test_a_body_past_its_limit_and_an_unknown_path_are_refused_in_the_same_form() -> None:
    agent = Agent(max_body_kib=1)
    large = agent(body={"input": "x" * 2000})
    assert large.status_code == 413 and "agent.max_body_kib=1" in large.json()["error"]["message"]
    assert "is not served" in agent("/v1/embeddings", {}).json()["error"]["message"]


def test_who_may_not_ask_is_refused() -> None:
    agent = Agent()

    def status(path: str = "/v1/responses", body: Any = QUESTION, **headers: str) -> int:
        return agent(path, body, headers=headers).status_code

    assert status(Authorization="Bearer wrong") == status(Authorization="") == 401
    assert status(Host="evil.example") == 421
    assert status(Origin="http://evil.example") == 403
    assert status(Origin="http://127.0.0.1") == 200
    assert agent(content=json.dumps(QUESTION), headers={"Content-Type": "text/plain"}).status_code == 415
    counted = agent("/metrics").text
    for reason, number in {"token": 2, "host": 1, "origin": 1, "type": 1}.items():
        assert f'agent_refusals_total{{reason="{reason}"}} {number}.0' in counted
    for path, expected in {
        "/": 200,
        "/page.js": 200,
        "/page.css": 200,
        "/health": 200,
        "/readyz": 200,
        "/metrics": 401,
        "/v1/models": 401,
    }.items():
        assert status(path, None, Authorization="") == expected, path
    assert not any(name.startswith("access-control-") for name in agent(body=QUESTION).headers)


def test_readiness_says_which_server_is_missing() -> None:
    agent = Agent()
    assert agent("/readyz").json() == {"status": "ready"}
    down = Agent()
    down.source.down = "the retriever does not answer"
    reply = down("/readyz")
    assert reply.status_code == 503 and reply.json()["status"] == "the retriever does not answer"


def test_a_full_service_refuses_and_says_when_to_come_back() -> None:
    agent = Agent(concurrency=1)
    agent.policy.holds = threading.Event()
    with listening(agent) as (url, _, _):
        first = threading.Thread(target=httpx.post, args=(f"{url}/v1/responses",), kwargs={"json": QUESTION, "headers": HEADERS, **NEWS})
        first.start()
        until(lambda: agent.service.active == 1)
        full = httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert "agent.concurrency=1" in full.json()["error"]["message"]
        assert httpx.get(f"{url}/readyz", **NEWS).status_code == 200
        agent.policy.holds.set()
        first.join()
        assert httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS).status_code == 200


def test_a_client_that_leaves_before_its_body_is_whole_costs_nothing() -> None:
    agent = Agent(concurrency=1)
    with listening(agent) as (url, _, _):
        with sent(url, "/v1/responses", QUESTION, missing=5):
            until(lambda: agent.service.requests == 1)
        until(lambda: agent.service.requests == 0)
        assert httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS).status_code == 200
        assert 'route="/v1/responses",status="500"' not in httpx.get(f"{url}/metrics", headers=HEADERS, **NEWS).text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_an_episode_ends_with_its_client(path: str, stream: bool) -> None:
    agent = Agent(concurrency=1)
    agent.policy.holds = threading.Event()
    with listening(agent) as (url, _, _):
        with sent(url, path, {**(QUESTION if path == "/v1/responses" else CHAT), "stream": stream}):
            until(agent.policy.began.is_set)
        until(lambda: agent.policy.cancelled.is_set() and agent.service.active == 0)
        assert agent.lines[-1]["stop"] == "gone"
        agent.policy.holds.set()
        assert httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS).status_code == 200
        assert 'agent_episodes_total{stop="gone"} 1.0' in httpx.get(f"{url}/metrics", headers=HEADERS, **NEWS).text


def test_a_stream_says_that_it_waits_and_its_words_come_one_by_one() -> None:
    agent = Agent(keep_alive_s=0.05)
    agent.policy.holds = threading.Event()
    body = {**QUESTION, "stream": True}
    with (
        listening(agent) as (url, _, _),
        httpx.Client(**NEWS) as client,
        client.stream("POST", f"{url}/v1/responses", json=body, headers=HEADERS) as reply,
    ):
        lines = reply.iter_lines()
        assert any("reasoning_text.delta" in line for line in lines)
        assert any(line == ": waiting" for line in lines)
        agent.policy.holds.set()
        assert any("response.completed" in line for line in lines)


def test_a_service_that_is_told_to_end_answers_what_it_accepted() -> None:
    agent = Agent()
    agent.policy.holds = threading.Event()
    replies: list[httpx.Response] = []
    with listening(agent) as (url, server, thread):
        asking = threading.Thread(target=lambda: replies.append(httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS)))
        asking.start()
        until(lambda: agent.service.active == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz", **NEWS).json()["status"] == "draining"
        refused = httpx.post(f"{url}/v1/responses", json=QUESTION, headers=HEADERS, **NEWS)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        agent.policy.holds.set()
        asking.join()
        thread.join(60)
        assert not thread.is_alive(), "the service did not end"
    assert replies[0].json()["status"] == "completed"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_what_a_service_that_ends_cannot_finish_is_told_so(path: str) -> None:
    agent = Agent(drain_s=0.2)
    agent.policy.holds = threading.Event()
    replies: list[httpx.Response] = []
    body = {**(QUESTION if path == "/v1/responses" else CHAT), "stream": True}
    with listening(agent) as (url, server, thread):
        asking = threading.Thread(target=lambda: replies.append(httpx.post(f"{url}{path}", json=body, headers=HEADERS, **NEWS)))
        asking.start()
        until(lambda: agent.service.active == 1)
        server.handle_exit(signal.SIGTERM, None)
        asking.join(60)
        thread.join(60)
        assert replies and not thread.is_alive(), "the stream broke off, or the service did not end"
    last = events(replies[0].text)[-1]
    assert last["type"] == "response.failed" if path == "/v1/responses" else last["error"]["type"] == "server_error"
    assert agent.service.active == 0 and agent.policy.cancelled.is_set()


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_a_fault_of_the_service_ends_a_stream_with_an_event(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(answering, "cite", broken)
    agent = Agent()
    told = events(agent(path, {**(QUESTION if path == "/v1/responses" else CHAT), "stream": True}).text)
    last = told[-1] if path == "/v1/chat/completions" else told[-1]["response"]
    assert "the service's log says why" in last["error"]["message"] and agent.service.active == 0
    assert 'agent_refusals_total{reason="error"} 1.0' in agent("/metrics").text


def test_a_metric_says_whether_questions_are_answered() -> None:
    agent = Agent()
    agent.source.down = "the model server does not answer"
    with listening(agent) as (url, _, _):
        until(lambda: "agent_ready 0.0" in httpx.get(f"{url}/metrics", headers=HEADERS, **NEWS).text)
        agent.source.down = None
        assert httpx.get(f"{url}/readyz", **NEWS).status_code == 503, "what was asked a moment ago is not asked again"
        until(lambda: httpx.get(f"{url}/readyz", **NEWS).status_code == 200)
        assert "agent_ready 1.0" in httpx.get(f"{url}/metrics", headers=HEADERS, **NEWS).text


def test_who_asks_at_the_same_time_shares_one_probe() -> None:
    agent, asked = Agent(), list[int]()

    async def slow() -> None:
        asked.append(1)
        await asyncio.sleep(0.1)

    async def main() -> None:
        agent.source.trouble = slow  # type: ignore[method-assign]
        await asyncio.gather(*(agent.service.trouble() for _ in range(20)))

    asyncio.run(main())
    assert len(asked) == 1


def test_a_name_that_was_served_is_answered_for_by_the_model_that_took_its_place() -> None:
    agent = Agent()
    agent("/v1/models")
    agent.source.backend = replace(agent.source.backend, model="policy-next")
    assert agent(body={**QUESTION, "model": "policy-test"}).json()["model"] == "policy-next"
    assert [model["id"] for model in agent("/v1/models").json()["data"]] == ["research-agent", "policy-next"]


def test_work_in_the_background_outlives_whatever_it_raises(caplog: pytest.LogCaptureFixture) -> None:
    done, errors = list[int](), iter([OSError(28, "No space left on device"), KeyError("x"), KeyError("x")])

    async def work() -> None:
        done.append(1)
        if error := next(errors, None):
            raise error

    async def main() -> None:
        ending = asyncio.Event()
        running = asyncio.create_task(rounds("a round", work, 0.01, ending))
        while len(done) < 6:
            await asyncio.sleep(0.01)
        ending.set()
        await asyncio.wait_for(running, 60)

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == ["a round failed; it is tried again in 0.01 s"] * 2, "each reason once"


def test_questions_stand_in_the_log_only_where_that_is_asked_for() -> None:
    quiet, told = Agent(), Agent(log_questions=True)
    for agent in (quiet, told):
        agent(body=QUESTION)
    assert "Aldmoor" not in json.dumps(quiet.lines) and quiet.lines[0]["searches"] == 1 and quiet.lines[0]["stop"] == "answered"
    assert (told.lines[0]["question"], told.lines[0]["answer"]) == (QUESTION["input"], "Ada King")
    assert TOKEN not in json.dumps(told.lines)


def test_metrics_count_by_fixed_labels() -> None:
    agent = Agent()
    agent(body=QUESTION)
    agent("/never/heard/of", {})
    text = agent("/metrics").text
    for line in (
        'agent_episodes_total{stop="answered"} 1.0',
        'agent_searches_total{fault="none"} 1.0',
        'agent_answers_total{supported="yes"} 1.0',
        'agent_requests_total{route="other",status="404"} 1.0',
        "agent_active_episodes 0.0",
    ):
        assert line in text
    assert "never" not in text


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_text() -> None:
    agent = Agent()
    policy = agent("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy and "*" not in policy
    folder = Path(page.__file__).parent
    texts = {name: (folder / name).read_text() for name in ("index.html", "page.js", "page.css")}
    for name, text in texts.items():
        assert not re.search(r"(?:https?:)?//[a-z]", text), name
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", texts["page.js"])
    assert not re.search(r"\son\w+=|style=|<script(?![^>]*src)", texts["index.html"])
