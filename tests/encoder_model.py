"""A small sentence-transformers folder with random weights, and texts of its words, for tests of the encoder."""

from __future__ import annotations

from pathlib import Path

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
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = folder.parent / f"{folder.name}-bert"
    bert.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ":", "query", "passage", *letters[1:], *(f"##{x}" for x in letters)]
    (bert / "vocab.txt").write_text("\n".join(dict.fromkeys(known)))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 16, intermediate_size=2 * hidden
    )
    BertModel(config).save_pretrained(bert)
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    SentenceTransformer(modules=[Transformer(str(bert)), Pooling(hidden)], device="cpu").save(str(folder))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("unused")
    return folder
