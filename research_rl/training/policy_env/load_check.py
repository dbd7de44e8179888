"""Load a model folder as any user would and let it write: `python -m research_rl.training.policy_env.load_check <folder>`.

Runs in the policy environment; prints one JSON line. Exit code 1 when the model does not load, run or stay finite.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PROMPT = "Question"
_NEW_TOKENS = 8


def main(arguments: list[str]) -> int:
    """Load, generate greedily, look at every score; return the exit code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(arguments[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer(_PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        generated = model.generate(prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    finite = all(bool(torch.isfinite(scores).all()) for scores in generated.logits)
    print(json.dumps({"tokens": int(generated.sequences.shape[1] - prompt.shape[1]), "finite": finite}))
    return 0 if finite else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
