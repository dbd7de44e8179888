"""OpenAI's own client, from the trainer's environment, reads what the agent's service answers: whole, streamed, failed and refused."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import Any

import httpx
import pytest
from answering import HEADERS, TOKEN, Agent, listening, until

from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process.proxies import bypass_loopback

PYTHON = CHECKOUT / ".venv-policy/bin/python"
BEGIN = """
import json, sys
import openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2], max_retries=0)
ASK = {"model": "research-agent", "input": "Who founded Aldmoor Mill?"}
CHAT = {"model": "research-agent", "messages": [{"role": "user", "content": "Who founded Aldmoor Mill?"}]}
out = {}
"""
WORKS = """
out["models"] = [model.id for model in client.models.list()]
whole = client.responses.create(**ASK, extra_body={"max_searches": 2})
out["text"], out["kinds"] = whole.output_text, [item.type for item in whole.output]
out["classes"] = [type(item).__name__ for item in whole.output]
message = whole.output[-1].content[0]
out["cited"], out["research"] = [(a.type, a.file_id) for a in message.annotations], whole.research
out["tokens"] = whole.usage.total_tokens
with client.responses.stream(**ASK) as stream:
    events = list(stream)
    out["final"] = stream.get_final_response().output_text
out["events"] = [event.type for event in events]
out["unknown"] = [type(e).__name__ for e in client.responses.create(**ASK, stream=True) if not type(e).__name__.endswith("Event")]
chat = client.chat.completions.create(**CHAT)
out["chat"] = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.choices[0].message.reasoning_content]
chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
out["chunks"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
out["chunk_tokens"] = chunks[-1].usage.total_tokens
"""
FAILS = """
with client.responses.stream(**ASK) as stream:
    out["events"] = [event.type for event in stream]
for name, call in {
    "response": lambda: client.responses.create(**ASK),
    "chat_stream": lambda: list(client.chat.completions.create(**CHAT, stream=True)),
    "unknown_model": lambda: client.responses.create(**{**ASK, "model": "gpt-4o"}),
    "token": lambda: client.with_options(api_key="wrong").responses.create(**ASK),
    "limit": lambda: client.responses.create(**ASK, extra_body={"top_k": 99}),
}.items():
    try:
        call()
    except openai.APIError as error:
        out[name] = [type(error).__name__, error.message]
"""
WAITS = """
out["text"] = client.with_options(max_retries=5).responses.create(**ASK).output_text
"""


def told(url: str, script: str) -> dict[str, Any]:
    """Run a script with the client and return what it put into `out`."""
    command = [str(PYTHON), "-c", f"{BEGIN}{script}\nprint(json.dumps(out))", url, TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **bypass_loopback(os.environ)}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="the trainer's environment, which has the client, is not installed")


def test_the_client_reads_answers_whole_and_streamed() -> None:
    with listening(Agent()) as (url, _, _):
        out = told(url, WORKS)
    assert out["models"] == ["research-agent", "policy-test"]
    assert out["text"] == "It is Ada King" and out["final"] == out["chunks"] == out["chat"][0] == out["text"]
    assert out["kinds"] == ["reasoning", "file_search_call", "reasoning", "message"]
    names = ["ResponseReasoningItem", "ResponseFileSearchToolCall", "ResponseReasoningItem", "ResponseOutputMessage"]
    assert out["classes"] == names and out["unknown"] == []
    assert out["cited"] == [["file_citation", "p1"]] and out["research"]["supported"] is True
    assert out["events"][0] == "response.created" and out["events"][-1] == "response.completed"
    assert out["chat"][1] == "stop" and "I look it up." in out["chat"][2]
    assert out["tokens"] == out["chunk_tokens"] > 0


def test_the_client_tells_what_failed_or_was_refused() -> None:
    agent = Agent()
    agent.policy.fails = ServiceError("broke off")
    with listening(agent) as (url, _, _):
        out = told(url, FAILS)
    assert out["events"][-1] == "response.failed"
    assert out["response"][0] == "InternalServerError" and out["chat_stream"][0] == "APIError"
    assert "the model server failed" in out["response"][1] and "the model server failed" in out["chat_stream"][1]
    assert out["unknown_model"][0] == "NotFoundError" and out["token"][0] == "AuthenticationError"
    assert out["limit"][0] == "BadRequestError" and "episode.top_k=3" in out["limit"][1]


def test_the_client_comes_back_to_a_service_that_was_full() -> None:
    agent = Agent(concurrency=1)
    agent.policy.holds = threading.Event()
    with listening(agent) as (url, _, _):
        first = threading.Thread(
            target=httpx.post,
            args=(f"{url}/v1/responses",),
            kwargs={"json": {"input": "q"}, "headers": HEADERS, "trust_env": False, "timeout": 600},
        )
        first.start()
        until(lambda: agent.service.active == 1)
        refused = agent.service.metrics.refused

        def free(reason: str) -> None:
            refused(reason)
            assert agent.policy.holds
            agent.policy.holds.set()

        agent.service.metrics.refused = free
        assert told(url, WAITS)["text"] == "It is Ada King"
        first.join()
