"""GPU check c: a served model answers episodes' requests; tokens/s at growing concurrency beside the bound of reading the weights.

Usage: python tests/gpu/serving.py --model FOLDER [--engine vllm|sglang] [--python PATH] [--toy]. Needs the checkout on PYTHONPATH and
an interpreter with the engine. `--toy` serves by vLLM on the processor. Prints one JSON line; asserts that greedy answers repeat, that a
stop text ends a turn, and that more sequences give more tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from research_rl.config import Config, load_profile
from research_rl.episode.prompts import load_tokenizer
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving.client import HttpEngine, Sampling
from research_rl.serving.serve import running


def main() -> None:
    """Serve the model, measure, print."""
    parser = argparse.ArgumentParser(description="Serve a model and measure it.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--python", help="interpreter with the engine; environments.policy when left out")
    parser.add_argument("--toy", action="store_true", help="vLLM on the processor, few tokens")
    arguments = parser.parse_args()
    config = configuration(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, running(config, Workspace(Path(folder)), arguments.model) as endpoint:
        start = time.perf_counter() - started
        found = asyncio.run(measure(config, endpoint, arguments.model, arguments.toy))
    print(json.dumps({"check": "serving", "toy": arguments.toy, "engine": arguments.engine, "start_s": start, **found}))


def configuration(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the server."""
    hardware, dtype = ("cpu", "float32") if arguments.toy else ("gpu", "bfloat16")
    chosen = [f"serving.engine={arguments.engine}", f"serving.hardware={hardware}", f"serving.dtype={dtype}"]
    chosen += ["serving.max_sequences=256", "prompt.max_tokens=256", f"episode.max_response_tokens={128 if arguments.toy else 512}"]
    chosen += [f"environments.policy={arguments.python}"] if arguments.python else []
    return load_profile("laptop", chosen)


async def measure(config: Config, endpoint: Endpoint, model: Path, toy: bool) -> dict[str, Any]:
    """Return tokens/s by concurrency after checking that answers repeat and stop."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    tokens, levels = (32, (1, 8)) if toy else (256, (1, 16, 64, 256))
    engine = HttpEngine(endpoint, Sampling(), engine=config.serving.engine, connections=max(levels))
    async with engine:
        prompt = list(range(5, 69))
        first, again = [await engine.generate(prompt, [], tokens) for _ in range(2)]
        assert list(first.ids) == list(again.ids), "greedy answers differ"
        await require_stop(engine, model, prompt, list(first.ids))
        rates = [{"sequences": level, **await rate(engine, level, tokens)} for level in levels]
    assert rates[-1]["tokens_per_s"] > rates[0]["tokens_per_s"], f"concurrency gains nothing: {rates}"
    one = rates[0]["tokens_per_s"] * weights / 1e9
    return {"weights_mb": weights / 1e6, "rates": rates, "read_gb_per_s_at_one": one}


async def require_stop(engine: HttpEngine, model: Path, prompt: list[int], ids: list[int]) -> None:
    """Assert that a text from the middle of an answer ends the same answer there."""
    tokenizer = load_tokenizer(model)
    text = tokenizer.decode(ids)
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = await engine.generate(prompt, [stop], len(ids))
    said = tokenizer.decode(list(cut.ids))
    assert stop in said and len(cut.ids) <= len(ids), f"stop text {stop!r} did not end {said!r}"


async def rate(engine: HttpEngine, level: int, tokens: int) -> dict[str, float]:
    """Ask for `level` answers at once, each after its own prompt."""
    chance = random.Random(level)
    prompts = [[chance.randrange(5, 200) for _ in range(64)] for _ in range(level)]
    started = time.perf_counter()
    answers = await asyncio.gather(*[engine.generate(prompt, [], tokens) for prompt in prompts])
    taken = time.perf_counter() - started
    return {"tokens_per_s": sum(len(answer.ids) for answer in answers) / taken, "seconds": taken}


if __name__ == "__main__":
    main()
