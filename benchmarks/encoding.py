"""P4: passages encoded per CPU-second by a model of e5-base's shape, against FlashRAG's batching and sentence-transformers.

Random weights and a made-up vocabulary of e5-base's sizes: speed depends on shapes, not on values. One thread each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.duel import Duel, alternate, cpu_seconds, rate
from benchmarks.peers import flashrag_encoding
from research_rl.embedding.sentence import SentenceEncoder, fast_bfloat16

VOCABULARY, LAYERS, HIDDEN, MAX_TOKENS = 30_522, 12, 768, 512
FLASHRAG_BATCH, PREFIX = 256, "passage: "
SYLLABLES = ("ba", "de", "fi", "ko", "lu", "ma", "ne", "ri", "so", "tu", "va", "ze", "cho", "gra", "pel", "sti")


def run(quick: bool) -> Iterator[Duel]:
    """Yield the duels; raises AssertionError when the sides' vectors point elsewhere."""
    torch.set_num_threads(1)
    count, rounds = (64, 2) if quick else (256, 5)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        words = _model(Path(scratch))
        passages = [" ".join(draw.choice(words, draw.integers(20, 101))) for _ in range(count)]
        ours, flashrag, sentence_transformers = _contestants(Path(scratch))
        tokens, padding = _same_vectors(ours, (flashrag, sentence_transformers), passages)
        peak = _bf16_peak()
        for name, peer, goal in (("FlashRAG's batching", flashrag, 4.0), ("sentence-transformers", sentence_transformers, 1.5)):
            what = f"e5-base shape, 20-100 words, against {name}"
            mine, theirs = (_rate(side, passages) for side in (ours.encode, peer))
            duel = alternate("P4", what, "passages per CPU-second", mine, theirs, goal, rounds)
            reached = duel.ours * tokens / count * _flop_per_token(tokens / count)
            yield replace(
                duel,
                note=f"{reached / peak:.0%} of the measured {ours.facts['dtype']} gemm peak of {peak / 1e9:,.0f} GFLOP/s a core "
                f"({reached / 1e9:,.0f}); {padding / (tokens + padding):.1%} padding",
            )


def _model(folder: Path) -> np.ndarray:
    """Write a random model of e5-base's shape; return words of one or two tokens each."""
    from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    stems = [a + b + c + d for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES for d in SYLLABLES][:25_000]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "passage", "query", ":", "##ly", *stems]
    known += [f"[unused{number}]" for number in range(VOCABULARY - len(known))]
    (folder / "vocab.txt").write_text("\n".join(known))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=HIDDEN, max_position_embeddings=MAX_TOKENS)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=MAX_TOKENS).save_pretrained(folder)
    return np.array([*stems, *(f"{stem}ly" for stem in stems[::3])])


def _contestants(folder: Path) -> tuple[SentenceEncoder, Callable[[list[str]], np.ndarray], Callable[[list[str]], np.ndarray]]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    facts = {"query_prefix": "query: ", "passage_prefix": PREFIX, "max_tokens": MAX_TOKENS, "batch_tokens": 4096}
    ours = SentenceEncoder.load(folder, {**facts, "normalised": True, "pooling": "mean", "dtype": fast_bfloat16()}, threads=1)
    plain, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    body = Transformer(str(folder))
    theirs = SentenceTransformer(modules=[body, Pooling(HIDDEN, "mean")], device="cpu")
    return (
        ours,
        lambda texts: flashrag_encoding.encode(plain, tokenizer, texts, FLASHRAG_BATCH, MAX_TOKENS),
        lambda texts: theirs.encode([PREFIX + text for text in texts], normalize_embeddings=True, show_progress_bar=False),
    )


def _same_vectors(ours: SentenceEncoder, peers: tuple[Callable[[list[str]], np.ndarray], ...], passages: list[str]) -> tuple[int, int]:
    """Compare a sample's vectors; return tokens and padding of all passages."""
    sample = passages[:16]
    mine = ours.encode(sample).vectors
    for peer in peers:
        cosine = (mine * peer(sample)).sum(axis=1).min()
        assert cosine > 0.999, f"cosine to a peer's vector {cosine:.4f}"
    found = ours.encode(passages)
    return found.tokens, found.padding


def _rate(encode: Callable[[list[str]], Any], passages: list[str]) -> Callable[[], float]:
    def measure() -> float:
        started = cpu_seconds()
        encode(passages)
        return len(passages) / (cpu_seconds() - started)

    return measure


def _flop_per_token(length: float) -> float:
    """Multiplications and additions for a token of a text of this length: the linear layers, scores and weighted sums."""
    return LAYERS * (24 * HIDDEN * HIDDEN + 4 * length * HIDDEN)


def _bf16_peak() -> float:
    """Return the best FLOP/s of the plain matrix product over the shapes that occur, in the encoder's number format."""
    dtype, rows = getattr(torch, fast_bfloat16()), 4096
    found: list[float] = []
    for inner, outer in ((HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, outer).to(dtype)
        torch.mm(left, right)
        for _ in range(3):
            found.append(rate(partial(_product, left, right), 0.5))
    return max(found)


def _product(left: torch.Tensor, right: torch.Tensor) -> int:
    torch.mm(left, right)
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]
