"""The stage `export`: the trained policy as a Hugging Face folder. Knows what verl writes; this process needs no torch and no verl.

verl writes the whole policy beside its shards (save content `hf_model`), in the optimizer's float32 and with a config that
says bfloat16. What is published has the initial policy's config, tokenizer and number format, the same tensors of the same
shapes, every number is finite, and the folder was loaded and let write in the policy environment.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from research_rl.errors import ModelError
from research_rl.paths import python_path
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.stages import Context
from research_rl.serving.model import inspect
from research_rl.serving.tensors import Bytes, Output, Tensor, blocks, content, read, tensors, to_bfloat16, weight_bytes, write
from research_rl.training import lora
from research_rl.training.run.run import interpreter

__all__ = ["load", "run", "verify", "write_like"]

_COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)


def run(context: Context) -> None:
    """Publish config, tokenizer and weights of the last checkpoint. Raises ModelError when they do not fit the policy."""
    policy, trained = context.parent("policy"), context.parent("train") / "checkpoint" / "actor" / "huggingface"
    with context.publish() as staging:
        # The trainer reads these files and writes them again in its library's words; the policy's own are the truth.
        for name in _COPIED:
            if (policy / name).is_file():
                shutil.copyfile(policy / name, staging.path / name)
        write_like(trained, policy, staging.path)
        inspect(staging.path)
        staging.counts.update(verify(staging.path, policy), step=context.parents["train"].counts["steps"])
        context.progress("every tensor is there; loading the model and generating", 0.7)
        staging.facts["loaded"] = load(staging.path, interpreter(context.config))


def load(folder: Path, python: Path) -> str:
    """Let the policy environment load the folder and generate; return what it said. Raises ModelError when it cannot.

    A model that needs more than half of this machine's free memory is left to the server that will load it anyway.
    """
    need = 2 * weight_bytes(folder)
    free = psutil.virtual_memory().available
    if 2 * need > free:
        return f"not tried: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB of memory free"
    # No hub and no GPU: the folder must be enough by itself, and GPUs may be in use.
    command = [str(python), "-m", "research_rl.training.policy_env.load_check", str(folder)]
    env = {**os.environ, **python_path(), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ModelError(f"the exported model does not load and generate ({''.join(reason)}); train again, or look at the checkpoint")
    return "generated, all scores finite"


def write_like(trained: Path, policy: Path, target: Path) -> None:
    """Write `trained`'s tensors below `target`, file by file, in the number format they have in `policy`; an adapter is merged."""
    formats, adapters = {name: tensor.dtype for name, tensor in tensors(policy).items()}, lora.adapters(trained)
    places: dict[str, str] = {}
    for path in sorted(trained.glob("*.safetensors")):
        in_file_order = sorted(read(path), key=lambda tensor: tensor.start)
        # A factor has no place of its own in the model: it is part of the weight it was merged into.
        outputs = [_output(tensor, adapters, formats) for tensor in in_file_order if not lora.is_factor(tensor.name)]
        write(target / path.name, outputs)
        places |= {output.name: path.name for output in outputs}
    for index in trained.glob("*.safetensors.index.json"):
        # The map is made anew: names have lost peft's prefixes, and factors are gone.
        listed = read_object(index, ModelError, "export or train again")
        (target / index.name).write_text(json.dumps({**listed, "weight_map": places}, indent=1) + "\n", encoding="utf-8")


def _output(tensor: Tensor, adapters: Mapping[str, lora.Adapter], formats: Mapping[str, str]) -> Output:
    name, count = lora.plain(tensor.name), math.prod(tensor.shape)
    adapter = adapters.get(name)
    # A merged weight is computed in float32, whatever its parts were stored in.
    dtype, size = ("F32", 4 * count) if adapter else (tensor.dtype, tensor.end - tensor.start)

    def pieces() -> Iterator[Bytes]:
        return blocks(adapter.merged(tensor).reshape(-1).view(np.uint8) if adapter else content(tensor))

    if dtype == "F32" and formats.get(name) == "BF16":
        return Output(name, "BF16", tensor.shape, 2 * count, lambda: map(to_bfloat16, pieces()))
    return Output(name, dtype, tensor.shape, size, lambda: (piece.tobytes() for piece in pieces()))


def verify(folder: Path, policy: Path) -> dict[str, int]:
    """Compare an exported model with the policy it came from; return the counts of tensors and parameters.

    Raises ModelError for a missing or foreign tensor, another shape, or a number that is not finite.
    """
    exported, original = tensors(folder), tensors(policy)
    # A tied tensor may stand on one side alone: libraries differ in whether they write it.
    tied = _tied(folder)
    if missing := sorted(set(original) - set(exported) - tied):
        raise ModelError(f"{folder} lacks {len(missing)} of the policy's {len(original)} tensors, the first {missing[0]!r}; export again")
    if foreign := sorted(set(exported) - set(original) - tied):
        raise ModelError(f"{folder} holds {len(foreign)} tensors the policy does not have, the first {foreign[0]!r}; export again")
    for name, tensor in exported.items():
        if name in original and tensor.shape != original[name].shape:
            raise ModelError(f"{name} has shape {tensor.shape} in {folder}, {original[name].shape} in the policy; export again")
        if not _finite(tensor):
            raise ModelError(f"{name} in {tensor.file} holds numbers that are not finite; train again with a lower train.lr")
    return {"tensors": len(exported), "parameters": sum(int(np.prod(t.shape)) for t in exported.values())}


def _tied(folder: Path) -> set[str]:
    """Return the tensors that may be left out because another one stands for them."""
    return {"lm_head.weight"} if _config(folder).get("tie_word_embeddings") else set()


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json", ModelError, "export or train again")


def _finite(tensor: Tensor) -> bool:
    """Look at the exponent bits of a floating-point tensor, block by block; bfloat16 needs no numpy type for that."""
    if tensor.dtype not in _EXPONENT:
        return True
    kind, mask = _EXPONENT[tensor.dtype]
    return all(not np.any((block.view(kind) & mask) == mask) for block in blocks(content(tensor)))


# All bits of the exponent are set in infinities and NaN, and in no other number.
_EXPONENT = {
    "F64": (np.dtype("<u8"), 0x7FF0000000000000),
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
