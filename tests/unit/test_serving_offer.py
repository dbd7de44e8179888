"""A model server that is known by its address alone gets no token id that its model does not have."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.errors import ModelError, ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving.client import EngineName, HttpEngine, Sampling
from research_rl.serving.offer import offers
from research_rl.serving.serve import running
from tests.json_server import JsonHandler, served

STOP = {"type": "stop", "matched": "</search>"}


def folder(path: Path, words: int, config: dict[str, Any] | None = None) -> Path:
    """Make the folder of a tokenizer of so many tokens, with a config.json where there is one."""
    path.mkdir()
    vocabulary = {"</s>": 0, "<unk>": 1, **{f"word{number}": number for number in range(2, words)}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@dataclass
class Server:
    """What a server says of its one model, on which pages; `received` are the ids that reached it."""

    pages: dict[str, Any]
    url: str = ""
    received: list[list[int]] = field(default_factory=list[list[int]])


def sglang(**pages: Any) -> Server:
    """As SGLang 0.5.23: /v1/models has the name in the place of the path."""
    about = {"id": "policy-x", "root": "policy-x", "owned_by": "sglang", "max_model_len": 100_000}
    return Server({"/v1/models": {"data": [about]}, **{f"/{name}": page for name, page in pages.items()}})


@contextmanager
def listening(server: Server) -> Generator[Server]:
    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.reply(200 if self.path in server.pages else 404, server.pages.get(self.path))

        def do_POST(self) -> None:
            server.received.append(self.body()["input_ids"])
            self.reply(200, {"meta_info": {"output_token_logprobs": [[-0.5, 2, None]], "finish_reason": STOP}})

    with served(Handler) as server.url:
        yield server


def endpoint_of(server: Server, tokenizer: Path) -> Endpoint:
    """Return the endpoint by which the offered model is asked."""
    [offer] = offers(server.url)
    with running(Config(), Workspace(tokenizer.parent), tokenizer, offer=offer) as endpoint:
        return endpoint


def send(endpoint: Endpoint, *ids: int, engine: EngineName = "sglang") -> None:
    async def main() -> None:
        async with HttpEngine(endpoint, Sampling(), engine=engine, attempts=1) as client:
            await client.generate(ids, ("</search>",), 1)

    asyncio.run(main())


def test_an_id_past_the_vocabulary_size_beside_the_tokenizer_is_not_sent(tmp_path: Path) -> None:
    tokenizer = folder(tmp_path / "t", 5, {"vocab_size": 8})
    with listening(sglang()) as server:
        endpoint = endpoint_of(server, tokenizer)
        send(endpoint, 4, 7)
        with pytest.raises(ModelError, match="token id 8 is none of the 8 of policy-x; take the tokenizer of this model"):
            send(endpoint, 4, 8)
    assert server.received == [[4, 7]]


@pytest.mark.parametrize("page", ["model_info", "get_model_info"])
def test_the_folder_that_the_server_read_counts_where_it_lies_here(tmp_path: Path, page: str) -> None:
    tokenizer, weights = folder(tmp_path / "t", 5), tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"vocab_size": 9, "text_config": {"vocab_size": 7}}))
    with listening(sglang(**{page: {"model_path": str(weights)}})) as server:
        assert endpoint_of(server, tokenizer).vocabulary == 7, "that of the language model within a model of images, too"


def test_the_lower_of_two_sizes_counts_and_that_of_vllms_folder(tmp_path: Path) -> None:
    tokenizer, weights = folder(tmp_path / "t", 5, {"vocab_size": 8}), folder(tmp_path / "w", 5, {"vocab_size": 6})
    with listening(Server({"/v1/models": {"data": [{"id": "x", "root": str(weights), "owned_by": "vllm"}]}})) as server:
        assert endpoint_of(server, tokenizer).vocabulary == 6
        assert endpoint_of(server, folder(tmp_path / "u", 5)).vocabulary == 6


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_a_question_is_asked(tmp_path: Path) -> None:
    tokenizer = folder(tmp_path / "t", 9, {"vocab_size": 8})
    said = r"tokenizer in .*/t has 9 tokens, policy-x at http.* reads 8 by the model in .*/t; name the folder of the model's own tokenizer"
    with listening(sglang()) as server, pytest.raises(ModelError, match=said):
        endpoint_of(server, tokenizer)


def test_what_cannot_be_checked_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = folder(tmp_path / "t", 5, {"model_type": "qwen2"})
    with listening(sglang(model_info={"model_path": "/nowhere/model"})) as server, caplog.at_level(logging.WARNING):
        endpoint = endpoint_of(server, tokenizer)
        send(endpoint, 99)
    assert endpoint.vocabulary is None and server.received == [[99]]
    [record] = caplog.records
    assert record.getMessage() == (
        f"{server.url} does not say how many tokens policy-x reads, and {tokenizer} has no config.json with a vocab_size: the ids of its "
        "5 tokens are sent unchecked, and one that the model does not have ends a server of SGLang; copy the model's config.json into that "
        "folder"
    )


def test_a_server_that_describes_its_model_as_no_object_is_an_error(tmp_path: Path) -> None:
    with listening(sglang(model_info=["policy-x"])) as server, pytest.raises(ServiceError, match="does not answer /model_info or"):
        endpoint_of(server, folder(tmp_path / "t", 5))
