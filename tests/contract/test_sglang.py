"""SGLang's real server on a CPU: the ids of its greedy text are those of vLLM and of transformers, and it refuses what it must.

`.venv-serve` is made first where it is not there, which takes minutes and 3 GB.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import chain_model
import generating
import httpx
import numpy as np
import pytest
from generating import SEARCH_END, ask, children
from safetensors.numpy import load_file, save_file

from research_rl.config import Config
from research_rl.episode.agent import Completion
from research_rl.episode.prompts import FolderTokenizer, load_tokenizer
from research_rl.errors import ModelError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving.client import HttpEngine, Sampling, render_sglang
from research_rl.serving.offer import TOKEN_VARIABLE, offers
from research_rl.serving.serve import running
from tests.waiting import PATIENCE_S

WORDS = ("who", "wrote", "Borel", "what", "is", "the", "capital", "of", "a", "hill")
CHAIN: dict[str, str | tuple[str, ...]] = {
    "?": "<search>",
    "<search>": "Borel",
    "Borel": "</search>",
    "</result>": "Ada",
    "Ada": chain_model.EOS,
}
CLOCK = {"tick": "tock", "tock": "tick", "coin": ("head", "tail"), "head": "coin", "tail": "coin"}
LONGEST = 96


def config(engine: str, temperature: float = 0.0) -> Config:
    """The episode's longest sequence is `LONGEST` tokens."""
    tree = {
        "prompt": {"max_tokens": 32},
        "episode": {"max_response_tokens": LONGEST - 32},
        "evaluation": {"temperature": temperature},
        "serving": {"engine": engine, "start_deadline_s": PATIENCE_S},
    }
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    subprocess.run([sys.executable, CHECKOUT / "requirements/install.py", "serve"], check=True, cwd=CHECKOUT)
    return Workspace(tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="module")
def chain(workspace: Workspace) -> Iterator[tuple[Endpoint, FolderTokenizer]]:
    """A model of which every word is known, on a server that follows seeds."""
    folder = chain_model.build(workspace.root / "chain", {**CHAIN, **CLOCK}, WORDS)
    before = children()
    with running(config("sglang", 1.0), workspace, folder, name="chain") as found:
        yield found, load_tokenizer(folder)
    assert children() <= before, "a process of the server outlived its block"


@pytest.fixture(scope="module")
def drawn(workspace: Workspace) -> Path:
    """A model with attention and weights drawn by a fixed seed: its text means nothing, and every operator takes part in it."""
    folder = chain_model.build(workspace.root / "drawn", CHAIN, WORDS)
    weights, draw = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    noisy = {name: values + draw.normal(0, 0.3, values.shape).astype(np.float32) for name, values in weights.items()}
    save_file(noisy, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


once = partial(generating.once, engine="sglang")


def test_turns_end_at_a_stop_string_at_the_end_of_the_sequence_and_at_the_limit(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    stop, eos, length = (once(endpoint, tokenizer.encode(text), limit) for text, limit in (("who ?", 20), ("</result>", 20), ("tick", 5)))
    assert (stop.finished_by, tokenizer.decode(stop.ids)) == ("stop", tokenizer.decode(tokenizer.encode("<search> Borel </search>")))
    assert (eos.finished_by, list(eos.ids)) == ("eos", [*tokenizer.encode("Ada"), tokenizer.eos_id])
    assert (length.finished_by, list(length.ids)) == ("length", tokenizer.encode("tock tick tock tick tock"))
    assert all(-1e-3 < value <= 0 for value in stop.logprobs) and len(stop.logprobs) == len(stop.ids)


def test_a_streamed_turn_is_the_turn_in_pieces(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    ids, pieces = tokenizer.encode("who ?"), list[Sequence[int]]()

    async def call(client: HttpEngine) -> list[Completion]:
        return [await client.stream(ids, SEARCH_END, 20, pieces.append)]

    (streamed,) = ask(endpoint, Sampling(), call, "sglang")
    assert streamed.ids == once(endpoint, ids, 20).ids == tuple(token for piece in pieces for token in piece)


def test_a_piece_of_a_stream_tells_new_tokens_alone(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    body = {**render_sglang(tokenizer.encode("tick"), SEARCH_END, 60, Sampling()), "stream": True}
    headers = {"Authorization": f"Bearer {endpoint.token}"}
    with httpx.stream("POST", f"{endpoint.url}/generate", json=body, headers=headers, timeout=PATIENCE_S, trust_env=False) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
    told = [len(json.loads(line)["meta_info"]["output_token_logprobs"]) for line in lines]
    assert sum(told) == 60 and max(told) < 30, told


def test_drawn_tokens_depend_on_prompt_and_seed_alone(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    ids = tokenizer.encode("coin")
    first, again, other = (once(endpoint, ids, 60, Sampling(1.0, seed)) for seed in (1, 1, 2))
    assert first.ids == again.ids != other.ids
    assert 5 < tokenizer.decode(first.ids).count("head") < 25


def test_the_longest_episode_fits_and_a_longer_one_is_refused(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    tick = tokenizer.encode("tick")
    assert len(once(endpoint, tick * 32, LONGEST - 32).ids) == LONGEST - 32
    with pytest.raises(ServiceError, match="HTTP 400"):
        once(endpoint, tick * (LONGEST + 8), 8)
    with pytest.raises(ServiceError, match="HTTP 400"):
        once(endpoint, tick * 60, LONGEST - 60 + 8)
    assert once(endpoint, tick, 1).finished_by == "length", "the server still answers"


def test_the_command_uses_no_flag_that_is_to_go(chain: tuple[Endpoint, FolderTokenizer], workspace: Workspace) -> None:
    lines = (workspace.services / "chain.log").read_text().splitlines()
    assert [line for line in lines if "--" in line and "deprecated" in line.lower()] == []


def test_a_wrong_token_is_refused_and_a_foreign_id_never_sent(chain: tuple[Endpoint, FolderTokenizer]) -> None:
    endpoint, tokenizer = chain
    with pytest.raises(ServiceError, match="HTTP 401"):
        once(Endpoint(endpoint.url, "wrong", endpoint.model), tokenizer.encode("tick"), 1)
    assert httpx.get(f"{endpoint.url}/v1/models", trust_env=False).status_code == 401
    with pytest.raises(ModelError, match="token id 100000 is none of"):
        once(endpoint, [100_000], 1)
    assert once(endpoint, tokenizer.encode("tick"), 1).finished_by == "length", "the server still answers"


def test_a_server_that_is_known_by_its_address_gets_no_foreign_id(
    chain: tuple[Endpoint, FolderTokenizer], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, tokenizer = chain
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer.folder / name).read_bytes())
    monkeypatch.setenv(TOKEN_VARIABLE, endpoint.token or "")
    [offer] = offers(endpoint.url)
    with running(config("sglang"), workspace, tmp_path, offer=offer) as offered:
        assert offered.vocabulary == endpoint.vocabulary and offer.root == endpoint.model, "the folder is told by /model_info alone"
        with pytest.raises(ModelError, match="token id 100000 is none of"):
            once(offered, [100_000], 1)
        assert once(offered, tokenizer.encode("tick"), 1).finished_by == "length", "the server still answers"


GREEDY = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for ids in json.load(sys.stdin):
    text = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    new = text[0, len(ids):]
    with torch.no_grad():
        scores = model(text).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    print(json.dumps([new.tolist(), scores.gather(1, new[:, None])[:, 0].tolist()]))
"""


def test_greedy_ids_and_their_log_probabilities_are_those_of_vllm_and_of_transformers(workspace: Workspace, drawn: Path) -> None:
    tokenizer, draw = load_tokenizer(drawn), random.Random(3)
    prompts = [tokenizer.encode(" ".join(draw.choices(WORDS, k=draw.randint(2, 20)))) for _ in range(20)]

    async def call(client: HttpEngine) -> list[Completion]:
        return list(await asyncio.gather(*(client.generate(ids, (), 24) for ids in prompts)))

    found: dict[str, list[Completion]] = {}
    for engine in ("sglang", "vllm"):
        with running(config(engine), workspace, drawn, name=f"drawn-{engine}") as endpoint:
            found[engine] = ask(endpoint, Sampling(logprobs=True), call, engine)
    interpreter = CHECKOUT / Config().environments.policy
    told = subprocess.run(
        [interpreter, "-c", GREEDY, drawn], input=json.dumps(prompts), capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    expected = [json.loads(line) for line in told.stdout.splitlines()]
    for completions in found.values():
        assert [list(completion.ids) for completion in completions] == [ids for ids, _ in expected]
        for completion, (_, scores) in zip(completions, expected, strict=True):
            assert completion.logprobs == pytest.approx(scores, abs=1e-3)
    assert len({completion.ids for completion in found["sglang"]}) > 10, "the texts differ from prompt to prompt"
