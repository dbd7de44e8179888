"""Turn SmolLM2's GGUF file into a trainable Hugging Face folder. A process of the policy environment.

The GGUF reader of transformers loses three details of this tokenizer, which are put back and checked by a round trip:
digit-by-digit splitting, the byte-level decoder, and `<|im_end|>` as end and padding token.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from research_rl.errors import ModelError

__all__ = ["convert", "main"]

_END = "<|im_end|>"
# An apostrophe, two spaces, digits, an accent, a line break and tags: what a wrong splitting or decoder alters.
_PROBE = "What's the capital of France?  2024 café\n<search> Paris </search>"


def convert(file: Path, target: Path) -> None:
    """Write config, bfloat16 weights and tokenizer to `target`, which appears only when complete. Raises ModelError."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = _tokenizer(file)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).bfloat16()
    model.config.dtype = "bfloat16"
    # It would hold a path of this machine.
    model.config._name_or_path = ""
    end = tokenizer.convert_tokens_to_ids(_END)
    # Engines take the end token from either file.
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = end
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _tokenizer(file: Path) -> PreTrainedTokenizerFast:
    raw = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    backend = raw.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=_END,
        pad_token=_END,
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = raw.chat_template
    _check(tokenizer, file)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    back = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False))
    if back != _PROBE:
        raise ModelError(f"{file}: the tokenizer turns {_PROBE!r} into {back!r}; this GGUF file is not SmolLM2's")
    if tokenizer.eos_token != _END or not tokenizer.chat_template:
        raise ModelError(f"{file}: end token {tokenizer.eos_token!r} or chat template is missing; this GGUF file is not SmolLM2-Instruct's")


def main(file: str, target: str) -> None:
    """Convert `file` into the folder `target`."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    convert(Path(file), Path(target))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
