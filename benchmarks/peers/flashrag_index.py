"""An index build in FlashRAG's pattern, in our own words: all texts in a list, fixed float32 batches, one concatenation, `index.add`.

The index file is written in place; the server reads the whole corpus and index into memory before its first answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.peers import flashrag_encoding

__all__ = ["answer", "build"]

_BATCH, _MAX_TOKENS = 256, 256


def build(corpus: Path, model: Path, index: Path) -> None:
    """Build a flat index of a corpus file."""
    texts = [json.loads(line)["contents"] for line in corpus.open(encoding="utf-8")]
    torch.set_num_threads(1)
    encoder, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    vectors = flashrag_encoding.encode(encoder, tokenizer, texts, _BATCH, _MAX_TOKENS)
    built = faiss.index_factory(vectors.shape[1], "Flat", faiss.METRIC_INNER_PRODUCT)
    built.add(vectors)
    faiss.write_index(built, str(index))


def answer(corpus: Path, model: Path, index: Path, query: str) -> str:
    """Open what the server needs and return the id of the best passage."""
    rows = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    found = faiss.read_index(str(index))
    encoder, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    vector = flashrag_encoding.encode(encoder, tokenizer, [query], 1, _MAX_TOKENS)
    return rows[found.search(vector, 1)[1][0][0]]["id"]
