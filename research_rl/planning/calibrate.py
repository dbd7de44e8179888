"""Measure in seconds how fast this machine does what the stages do, with their own code on a small sample.

Knows the code paths; keeps nothing. All rates are CPU-seconds a passage.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from research_rl.config import Config, EncoderConfig, IndexConfig
from research_rl.corpus import build, store
from research_rl.errors import ManifestError, ModelError
from research_rl.paths import cache_folder
from research_rl.pipeline import arrays
from research_rl.pipeline.manifest import file_sha256
from research_rl.pipeline.stages import Workspace

if TYPE_CHECKING:
    from research_rl.embedding.sentence import SentenceEncoder
    from research_rl.index.vectors import VectorFiles

__all__ = [
    "by_shape",
    "by_shape_query",
    "known",
    "machine",
    "measure",
    "operations",
    "sentence_encoder",
    "shaped",
    "texts",
    "verified",
    "width",
]

# Enough rows to outweigh what a call costs, few enough for a plan in seconds.
_SAMPLE = 4000
_VECTORS = 30_000
_DEEPEST = 21
"""Hits a query that the index stage compares."""
_WORDS = 100
_TOKENS_A_WORD = 1.35
_START_S = 1.5
"""CPU-seconds of a stage's imports."""
SHAPES = {"e5-small": (12, 384), "e5-base": (12, 768), "e5-large": (24, 1024), "bge-small": (12, 384), "bge-base": (12, 768),
          "bge-large": (24, 1024), "mpnet-base": (12, 768), "minilm-l6": (6, 384), "minilm-l12": (12, 384)}  # fmt: skip
"""Layers and width of known encoders, by a part of their name."""


def machine() -> str:
    """Return what tells this processor from another in the cache of rates."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def texts(workspace: Workspace) -> list[str]:
    """Return passages of the workspace's corpus as a sample, generated ones of 100 words where there is none yet."""
    try:
        return store.PassageStore(workspace.folder("corpus")).texts(0, _SAMPLE)
    except ManifestError:
        generator = np.random.default_rng(0)
        # Word frequencies of a natural text, because the cost of an index of words depends on how often words repeat.
        ranks = np.minimum(generator.zipf(1.3, (_SAMPLE, _WORDS)), 200_000)
        return [" ".join(f"w{rank}" for rank in row) for row in ranks]


def measure(stage: str, config: Config, sample: list[str]) -> float:
    """Return the CPU-seconds a passage takes in `stage` (corpus, embed or index)."""
    with tempfile.TemporaryDirectory() as folder:
        return {"corpus": _corpus, "embed": _embed, "index": _index}[stage](config, sample, Path(folder))


def _corpus(config: Config, sample: list[str], folder: Path) -> float:
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"id": str(n), "contents": text}) + "\n" for n, text in enumerate(sample)))

    def work() -> None:
        with source.open("rb") as stream:
            build.shard(stream, 0, 0, len(sample), store.shard_name(0), folder)
        for _ in range(2):  # once for the unit of work, once for the manifest
            _hash_all(folder)

    return _seconds(work) / len(sample)


def _embed(config: Config, sample: list[str], folder: Path) -> float:
    if config.encoder.kind == "sentence":
        # A transformer takes far longer a passage than hashing does.
        return _sentence(config, sample[: _SAMPLE // 16])
    from research_rl.embedding.lexical import LexicalEncoder

    def work() -> None:
        encoder = LexicalEncoder.fit([sample[start : start + 1000] for start in range(0, len(sample), 1000)], config.encoder.dim)
        for start in range(0, len(sample), 1000):
            arrays.save(folder / f"{start}.npy", encoder.encode_passages(sample[start : start + 1000]))
        _hash_all(folder)
        _hash_all(folder)

    return _seconds(work) / len(sample)


def sentence_encoder(config: Config, threads: int = 0) -> SentenceEncoder:
    """Return the configuration's sentence encoder, opened as the stage embed opens it; `threads` 0 takes all cores. Raises ModelError."""
    from research_rl.embedding import models, presets
    from research_rl.embedding.sentence import SentenceEncoder, number_format

    source = models.resolve(config.encoder, config.transfer, cache_folder(), Path())
    facts = {**presets.settle(config.encoder, source), "dtype": number_format(config.encoder.dtype)}
    return SentenceEncoder.load(source, facts, threads=threads)


def _sentence(config: Config, sample: list[str]) -> float:
    with sentence_encoder(config) as encoder:
        # The first batch also pays for thread pools and kernels that are chosen once.
        encoder.encode_passages(sample[:16])
        return _seconds(lambda: encoder.encode_passages(sample)) / len(sample)


def _index(config: Config, sample: list[str], folder: Path) -> float:
    seconds = 0.0
    if config.index.kind != "bm25" and not config.index.prebuilt:
        seconds += _dense(config, folder)
    if config.index.kind != "dense":
        from research_rl.index import bm25

        seconds += _seconds(lambda: bm25.write(_Texts(sample), config.index, folder)) / len(sample)
    return seconds


class _Texts:
    """A list of texts as a passage store."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, start: int, stop: int) -> list[str]:
        return self._texts[start:stop]

    def batches(self, size: int) -> Iterator[tuple[int, list[str]]]:
        for start in range(0, len(self._texts), size):
            yield start, self._texts[start : start + size]


def _dense(config: Config, folder: Path) -> float:
    """Build one file of random vectors as the index stage would, and prove it; training, done once, is left out."""
    from research_rl.index.dense import learn, write
    from research_rl.index.search import EXACT
    from research_rl.index.vectors import VectorFiles

    generator, dim = np.random.default_rng(0), width(config.encoder)
    vectors = generator.standard_normal((_VECTORS, dim), dtype=np.float32)
    arrays.save(folder / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    files = VectorFiles([folder / "vectors.npy"], dim)
    (folder / "made").mkdir()
    empty = None if config.index.factory == EXACT else learn(config.index, files)

    def work() -> None:
        write(config.index, empty, files, 0, 0, _VECTORS, folder / "made")
        for _ in range(2):  # once for the unit of work, once for the manifest
            _hash_all(folder / "made")

    return (_seconds(work) + _proved(config.index, files, folder / "made")) / _VECTORS


def _proved(config: IndexConfig, files: VectorFiles, folder: Path) -> float:
    """Return the CPU-seconds of comparing the replies of an index with exact ones; an exact index is not compared."""
    from research_rl.index import budget, report
    from research_rl.index.dense import open_vectors

    if budget.exact(config):
        return 0.0
    queries = files.take(files.spread(config.sample))
    # Without what rescoring takes, which does not grow with the index.
    codes = open_vectors(folder, {"factory": config.factory}, files, [(0, len(files))], 1, numbers=[0])
    return _seconds(lambda: (report.exact(queries, files, _DEEPEST), codes.search(queries, config.candidates)))


def shaped(config: EncoderConfig, stage: str) -> bool:
    """Return whether the rate of `stage` must be reckoned: its encoder is a known one and not on this machine."""
    if stage != "embed" or config.kind != "sentence" or _shape(config) is None:
        return False
    from research_rl.embedding import models

    model = config.model or ""
    if model.startswith("pypi:"):
        package = model.removeprefix("pypi:").partition("/")[0].partition("==")[0].replace("-", "_").lower()
        return not any((cache_folder() / "wheels").glob(f"{package}-*"))
    return not Path(model).expanduser().is_dir() and not models.in_cache(config, cache_folder())


def by_shape(config: EncoderConfig) -> float:
    """Return the CPU-seconds a passage of 100 words takes in an encoder of this shape at the machine's matrix rate."""
    return operations(config, _WORDS * _TOKENS_A_WORD) / _matrix_rate()


def by_shape_query(config: EncoderConfig, words: int) -> float:
    """Return the CPU-seconds that a query of so many words takes, reckoned as in `by_shape`."""
    return operations(config, words * _TOKENS_A_WORD) / _matrix_rate()


def operations(config: EncoderConfig, tokens: float = _WORDS * _TOKENS_A_WORD) -> float:
    """Return the operations that a text, a passage of 100 words when left out, takes in an encoder of a known shape. Raises ModelError."""
    shape = _shape(config)
    if shape is None:
        raise ModelError(f"encoder.model={config.model} is not among {list(SHAPES)}; give a folder")
    layers, width = shape
    tokens = min(config.max_tokens or np.inf, tokens)
    # 12 width^2 weights a layer (attention 4, MLP 8) and the two products of attention, each 2 operations a weight and token.
    return 2 * tokens * layers * (12 * width**2 + 2 * tokens * width)


def known(config: EncoderConfig) -> bool:
    """Return whether the encoder's shape is known by its name."""
    return config.kind == "sentence" and _shape(config) is not None


def width(config: EncoderConfig) -> int:
    """Return the length of the encoder's vectors: that of its known shape, else encoder.dim."""
    shape = _shape(config) if config.kind == "sentence" else None
    return shape[1] if shape else config.dim


def _shape(config: EncoderConfig) -> tuple[int, int] | None:
    return next((shape for name, shape in SHAPES.items() if name in (config.model or "").lower()), None)


def _matrix_rate() -> float:
    """Return operations per CPU-second of a matrix product of an encoder's size, in the number format that it would take here."""
    import torch

    from research_rl.embedding.sentence import fast_bfloat16

    # Where the processor has no instructions for it, bfloat16 is emulated, and the encoder takes float32.
    kind, threads = getattr(torch, fast_bfloat16()), torch.get_num_threads()
    a, b = torch.randn(2048, 768).to(kind), torch.randn(768, 3072).to(kind)
    # On a busy machine threads that wait for each other would count as work.
    torch.set_num_threads(1)
    try:
        # Not timed: the first product sets up the library.
        _ = a @ b
        return 2 * 2048 * 768 * 3072 * 4 / _seconds(lambda: [a @ b for _ in range(4)])
    finally:
        torch.set_num_threads(threads)


def verified(size: float) -> float:
    """Return the CPU-seconds of comparing `size` bytes of a parent artifact with its manifest, and of starting up."""
    block = bytes(1 << 20)
    return _START_S + size * _seconds(lambda: [sha256(block) for _ in range(64)]) / (64 << 20)


def _hash_all(folder: Path) -> None:
    for path in folder.iterdir():
        file_sha256(path)


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    # Never zero: rates are divided by it.
    return max(time.process_time() - started, 1e-6)
