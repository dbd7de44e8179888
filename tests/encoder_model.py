"""Small sentence-transformers folders with random weights, an encoder and a cross-encoder, and texts of their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["the", "of", "in", "a", "who", "born", "river", "city", "painter", "king", "queen", "ship", "sings", "wrote"]
FACTS = {"normalised": True, "query_prefix": "", "passage_prefix": "", "max_tokens": 48, "batch_tokens": 256, "dtype": "float32"}


def texts(count: int) -> list[str]:
    """Return `count` texts of 1 to 59 words, the same at every call."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 60))) for _ in range(count)]


def write_model(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """Write the model into `folder`, which then also holds a file of another format; return it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertModel, BertTokenizerFast

    bert = folder.parent / f"{folder.name}-bert"
    _write_vocabulary(bert)
    torch.manual_seed(0)
    BertModel(_shape(hidden, layers)).save_pretrained(bert)
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    SentenceTransformer(modules=[Transformer(str(bert)), Pooling(hidden)], device="cpu").save(str(folder))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("unused")
    return folder


def write_reranker(folder: Path, seed: int = 0, labels: int = 1) -> Path:
    """Write a cross-encoder into `folder`; return it. Its scores lie some units apart, as those of a trained one do."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification, BertTokenizerFast

    bert = folder.parent / f"{folder.name}-bert"
    _write_vocabulary(bert)
    torch.manual_seed(seed)
    config = _shape(32, 2)
    config.num_labels, config.initializer_range = labels, 0.3
    BertForSequenceClassification(config).save_pretrained(bert)
    BertTokenizerFast(str(bert / "vocab.txt"), model_max_length=96).save_pretrained(bert)
    CrossEncoder(str(bert), device="cpu").save_pretrained(str(folder))
    return folder


def _write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    digits = [*map(str, range(10)), *(f"##{n}" for n in range(10))]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ":", "query", "passage", *letters[1:], *(f"##{x}" for x in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*known, *digits])))


def _shape(hidden: int, layers: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=100, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 16, intermediate_size=2 * hidden
    )
