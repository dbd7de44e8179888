"""A served model whose every word is known: after each token it writes the one that a table names. Built without torch.

A one-layer Qwen2 model with zeroed attention and MLP passes its one-hot embeddings through, and its output head is the
table, so a real engine computes it like any other model and greedy decoding is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = "<eos>"
TAGS = ("<think>", "</think>", "<search>", "</search>", "<result>", "</result>", "<answer>", "</answer>", "\\boxed{")


def build(folder: Path, chain: dict[str, str | tuple[str, ...]], more_words: tuple[str, ...] = ()) -> Path:
    """Write a model folder; `chain` maps each token to its successor, or to several equally likely; others end with eos."""
    followers = {word: (after,) if isinstance(after, str) else after for word, after in chain.items()}
    words = ["<unk>", EOS, *TAGS, *followers, *(word for after in followers.values() for word in after), *more_words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = -(-len(vocabulary) // 64) * 64
    (folder / "config.json").write_text(json.dumps(_config(size, vocabulary[EOS])))
    table = np.full((size, size), -10.0, np.float32)
    for word, number in vocabulary.items():
        for after in followers.get(word, (EOS,)):
            table[vocabulary[after], number] = 10.0
    save_file(_weights(size, table), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def _config(size: int, eos_id: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": size // 32,
        "num_key_value_heads": size // 32,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
    }


def _weights(size: int, table: np.ndarray) -> dict[str, np.ndarray]:
    zeros, layer = np.zeros((size, size), np.float32), "model.layers.0."
    weights = {
        "model.embed_tokens.weight": np.eye(size, dtype=np.float32),
        "model.norm.weight": np.ones(size, np.float32),
        "lm_head.weight": table,
        f"{layer}input_layernorm.weight": np.ones(size, np.float32),
        f"{layer}post_attention_layernorm.weight": np.ones(size, np.float32),
        f"{layer}self_attn.o_proj.weight": zeros.copy(),
        f"{layer}mlp.gate_proj.weight": np.zeros((64, size), np.float32),
        f"{layer}mlp.up_proj.weight": np.zeros((64, size), np.float32),
        f"{layer}mlp.down_proj.weight": np.zeros((size, 64), np.float32),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"{layer}self_attn.{name}.weight"] = zeros.copy()
        weights[f"{layer}self_attn.{name}.bias"] = np.zeros(size, np.float32)
    return weights
