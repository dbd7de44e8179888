"""Encoders: what turns queries and passages into vectors. Heavy libraries load with the encoder that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from research_rl.errors import ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest

__all__ = ["ENCODER", "Encoded", "Encoder", "Vectors", "load_encoder", "vector_shards"]

Vectors = npt.NDArray[np.float32]
"""Rows of unit length (all zero for a text without any word), shape [n, dim]."""

ENCODER = "encoder"
"""Folder of the encoder's own files inside an embeddings artifact."""


@dataclass(frozen=True)
class Encoded:
    """Vectors [rows, dim], the tokens read, and how many further ones were padding."""

    vectors: Vectors
    tokens: int = 0
    padding: int = 0


class Encoder(Protocol):
    """Turns text into vectors whose inner product is the relevance score."""

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a query, shape [len(texts), dim]."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """Return one vector a passage, shape [len(texts), dim]."""
        ...


def load_encoder(folder: Path, artifact: Manifest | None = None) -> Encoder:
    """Return the encoder that built the embeddings artifact in `folder`, with its recorded prefixes and pooling.

    Raises ManifestError when the folder is no embeddings artifact or carries no encoder, and ModelError when its model is unusable.
    """
    artifact = artifact or manifest.load(folder, verify=False)
    if artifact.stage != "embed":
        raise ManifestError(f"{folder} holds stage {artifact.stage}, not embeddings; name the folder artifacts/embeddings")
    facts: dict[str, Any] = artifact.facts["encoder"]
    if facts["kind"] == "none":
        raise ManifestError(
            f"{folder} carries no encoder (encoder.kind=none); set index.kind=bm25, or encoder.kind=lexical or sentence, and rerun"
        )
    if facts["kind"] == "lexical":
        # Imported here: the lexical encoder needs no torch, and a retriever with it starts in a fraction of the time.
        from research_rl.embedding.lexical import LexicalEncoder

        return LexicalEncoder.load(folder / ENCODER)
    from research_rl.embedding.sentence import SentenceEncoder, fast_bfloat16

    # Queries may meet vectors made on another machine; bfloat16 without instructions for it would be slower than float32.
    slow = facts["dtype"] == "bfloat16" and fast_bfloat16() == "float32"
    return SentenceEncoder.load(folder / ENCODER, facts, dtype="float32" if slow else None)


def vector_shards(folder: Path, artifact: Manifest) -> list[Path]:
    """Return the vector files of an embeddings artifact in row order."""
    return [folder / entry.path for entry in artifact.files if entry.path.startswith("vectors-")]
