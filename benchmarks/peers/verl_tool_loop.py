"""Runs in the policy environment: the CPU time of a turn in our agent loop and in verl's ToolAgentLoop, alternately.

Arguments: work folder, rounds, episodes a round. Both loops get the same tokenizer, turns of 110 tokens and results of 200
tokens, four searches and an answer an episode, and an engine and a search that answer at once. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.workers.rollout.replica import TokenOutput

from research_rl.config import Config
from research_rl.episode.trajectory import Passage
from research_rl.training.run import overrides
from research_rl.training.run.overrides import Paths

SEARCHES, TURN, RESULT = 4, 110, 200
EOS = "<|im_end|>"
_NAME = "verl.experimental.agent_loop.tool_agent_loop.ToolAgentLoop"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "Where does the sister of the painter of the blue harbour live?"
RESULT_TEXT = ("harbour " * RESULT)[:RESULT]
ROW = {
    "data_source": "bench",
    "reward_model": {"ground_truth": {"target": ["Avonlea"]}},
    "extra_info": {"id": "q", "split": "train", "question": QUESTION, "index": 0},
    "raw_prompt": [{"role": "user", "content": QUESTION}],
    "uid": "u",
    "session_id": 0,
    "global_steps": 1,
}


def build_model(folder: Path) -> Path:
    """Write a model folder whose tokenizer has one token a byte."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken("<|im_start|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


class Engine:
    """Plays the turns of an episode at once, in the shape of verl's server client."""

    def __init__(self, turns: list[list[int]]) -> None:
        self.turns, self.played = turns, 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        ids = self.turns[self.played % len(self.turns)]
        self.played += 1
        extra = {"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason="completed", extra_fields=extra)


class Client:
    """A search that answers at once."""

    async def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        return [[Passage("p", RESULT_TEXT)] for _ in queries]

    def take_counts(self) -> dict[str, int]:
        return {}


async def search(query: str) -> str:
    """Answer at once."""
    return RESULT_TEXT


def trainer(model: Path) -> Any:
    """Return the part of verl's configuration that both loops read."""
    turns = {"max_user_turns": None, "max_assistant_turns": None, "max_parallel_calls": 1, "max_tool_response_length": 4096}
    multi_turn = {**turns, "tool_response_truncate_side": "middle", "format": "hermes"}
    rollout = {"prompt_length": 1024, "response_length": 4096, "full_determinism": False, "multi_turn": multi_turn}
    return OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(model)}, "rollout": rollout}, "data": {}})


def common(model: Path, engine: Engine) -> dict[str, Any]:
    """Return the arguments that verl's worker gives to every loop."""
    wrapped = trainer(model)
    return {
        "trainer_config": DictConfigWrap(wrapped),
        "server_manager": engine,
        "tokenizer": AutoTokenizer.from_pretrained(model),
        "processor": None,
        "dataset_cls": None,
        "data_config": DictConfigWrap(wrapped.data),
        "hf_model_type": None,
    }


def padded(text: str, opening: str) -> str:
    """Return a turn of TURN tokens: `opening`, filling, `text`; the end of sequence is one token."""
    length = len(opening) + len(text) - (len(EOS) - 1) * text.endswith(EOS)
    return opening + "a" * (TURN - length) + text


def our_loop(folder: Path, model: Path) -> Any:
    """Return our loop, its engine playing ReSearch's tags."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    (folder / "template.txt").write_text("{question}")
    config = Config.model_validate(
        {
            "prompt": {"template": "file", "path": str(folder / "template.txt")},
            "episode": {"max_response_tokens": 4096, "max_searches": SEARCHES},
        }
    )
    paths = Paths(model, folder, folder, folder, folder)
    paths.agent.write_text(overrides.agent_yaml(config, paths, "http://127.0.0.1:9"))
    texts = [padded("</think><search>blue harbour</search>", "<think>")] * SEARCHES
    texts.append(padded("</think><answer>\\boxed{Avonlea}</answer>" + EOS, "<think>"))
    engine = Engine([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    loop = hydra.utils.instantiate(config=OmegaConf.load(paths.agent)[0], **common(model, engine))
    loop._shared = replace(loop._shared, client=Client())
    return loop


def verls_loop(model: Path) -> Callable[[], Any]:
    """Return what makes verl's loop, its engine calling the tool in Hermes format."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    parameters = {"type": "object", "properties": {"query": {"type": "string", "description": "query"}}, "required": ["query"]}
    schema = {"type": "function", "function": {"name": "search", "description": "search", "parameters": parameters}}
    tool = FunctionTool("search", search, OpenAIFunctionToolSchema.model_validate(schema), is_async=True)
    call = '<tool_call>{"name": "search", "arguments": {"query": "blue harbour"}}</tool_call>'
    texts = [padded(call + EOS, "think")] * SEARCHES
    texts.append(padded("Avonlea" + EOS, "think"))
    engine = Engine([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    agent, parts = OmegaConf.create({"_target_": _NAME}), common(model, engine)
    return lambda: hydra.utils.instantiate(config=agent, **parts, tools=ToolListWrap([tool]))


async def microseconds(make: Callable[[], Any], episodes: int) -> float:
    """Return CPU time of this process per turn; `make` is asked for a loop for every episode."""
    started = time.process_time()
    for _ in range(episodes):
        out = await make().run({"temperature": 1.0}, **ROW)
        assert sum(out.response_mask) == TURN * (SEARCHES + 1), (sum(out.response_mask), out.num_turns)
    return (time.process_time() - started) / (episodes * (SEARCHES + 1)) * 1e6


async def main() -> None:
    """Alternate the loops and print what each round took. Verl's worker makes a loop for every episode, ours one for all."""
    folder, rounds, episodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = build_model(folder / "model")
    ours, peer = our_loop(folder, model), verls_loop(model)
    makers = {"ours": lambda: ours, "peer": peer}
    for make in makers.values():
        await microseconds(make, 3)
    found: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            found[name].append(await microseconds(make, episodes))
    print(json.dumps(found))


asyncio.run(main())
