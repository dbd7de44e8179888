"""The workspace of `wiki_scale`: generated passages and vectors of text-like structure, published as the stages publish theirs.

Passages go through the stage corpus, the encoder (MiniLM) through the stage embed. The vectors cannot be encoded in one sitting: they are
drawn in clusters whose sizes fall as one over their rank, and which are widest in few directions, as those of texts are. Rows near
the encoder's vector of each question are planted, with their clusters, so that questions have neighbours at every distance.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.load import queries
from research_rl.config import Config, config_hash, located, parameters
from research_rl.embedding import ENCODER, Vectors
from research_rl.embedding.standing import keys_name, keys_of
from research_rl.pipeline import arrays, manifest
from research_rl.pipeline.copying import place
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.planning import calibrate

__all__ = ["ASKED", "SEEDS", "Texts", "draw", "publish", "research", "sizes", "write_corpus"]

SEEDS, ASKED = (1, 2, 3), 700
"""Questions with planted rows: the first `ASKED` of `load.queries` for each of these seeds."""
_A_CLUSTER, _FLAT = 100, 200
"""Rows of a cluster in the mean; the sizes are as 1 / (rank + 200): of 21 million rows 15,000 to 14."""
_BASES, _DIRECTIONS, _NARROW = 64, 24, 0.8
"""Clusters share 64 sets of 24 directions, in which 0.8 of their variance lies."""
_NOISE = 0.5
"""Length of what a planted row differs by from the question's vector, whose length is 1."""
_POOL = 1 << 16
"""Draws of what lies in no direction more than in another. Each file takes them in another order with other signs, as drawing is dear."""
_PHRASES, _WORDS = 4096, 8
_CANARIES, _CANARY_CHARS = 8, 300
"""Which passages the stage embed names as canaries, and how much of them it asks for."""
_DRAWN, _ENCODED = "drawn", "encoded.npy"

Rows = npt.NDArray[np.int64]


def research(workspace: Workspace, *arguments: str) -> None:
    """Run a verb of the command line in the workspace, its output to stderr; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "research_rl", *arguments, "-w", str(workspace.root)], check=True, stdout=sys.stderr)


class Texts:
    """The passages: a title with the row's number, and one of some thousand phrases; the row's number is the id."""

    def __init__(self, rows: int) -> None:
        draw = np.random.default_rng(0)
        words = [f"{a}{b}{c}" for a in "bcdfglmnprst" for b in ("ado", "eri", "ilu", "ona", "upe") for c in ("n", "r", "s")]
        self._phrases = [" ".join(draw.choice(words, _WORDS)) for _ in range(_PHRASES)]
        self._chosen = draw.integers(0, _PHRASES, rows)

    def contents(self, rows: range) -> list[str]:
        """Return the texts of rows."""
        chosen = self._chosen[rows.start : rows.stop].tolist()
        return [f'"Entry {row}"\n{self._phrases[phrase]}.' for row, phrase in zip(rows, chosen, strict=True)]

    def lines(self, size: int = 1 << 16) -> Iterator[str]:
        """Yield them all as lines of JSON, many at once."""
        for rows in _blocks(len(self._chosen), size):
            yield "".join(
                f'{{"id": "{row}", "contents": {json.dumps(text)}}}\n' for row, text in zip(rows, self.contents(rows), strict=True)
            )


def _blocks(rows: int, size: int) -> list[range]:
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def write_corpus(config: Config, workspace: Workspace, rows: int) -> None:
    """Publish, in place of download and validate, a checked corpus file of one short line a passage."""
    with manifest.publish(workspace.folder("download"), "download", config_hash(config, STAGES["download"].sections), {}) as staging:
        staging.counts["corpus"] = rows
        with (staging.path / "corpus.jsonl").open("w") as stream:
            stream.writelines(Texts(rows).lines())
    parents = {"download": manifest.load(workspace.folder("download"), verify=False)}
    with manifest.publish(workspace.folder("validate"), "validate", config_hash(config, STAGES["validate"].sections), parents):
        pass


def draw(config: Config, workspace: Workspace, rows: int, jobs: int) -> None:
    """Write the vectors and keys of all files, in `jobs` processes at once; those that are there from a killed run are kept."""
    folder, texts = workspace.root / _DRAWN, Texts(rows)
    folder.mkdir(exist_ok=True)
    canaries = np.unique(np.linspace(0, rows - 1, _CANARIES).astype(int)).tolist()
    given, asked = _encoded(config, [texts.contents(range(row, row + 1))[0][:_CANARY_CHARS] for row in canaries], folder / _ENCODED)
    cloud = _Cloud.drawn(rows, asked, np.array(canaries), given)
    blocks = _blocks(rows, config.encoder.shard_rows)
    # Forked, so that all share the clusters; they use NumPy alone, which may be forked.
    with multiprocessing.get_context("fork").Pool(jobs, _ready, (cloud, texts, folder)) as pool:
        for done, _ in enumerate(pool.imap_unordered(_shard, enumerate(blocks)), 1):
            print(f"{done} of {len(blocks)} files of vectors", file=sys.stderr, flush=True)


def _encoded(config: Config, canaries: list[str], path: Path) -> tuple[Vectors, Vectors]:
    """Return the vectors of the canaries and of all questions, from `path` where a killed run left them."""
    if not path.exists():
        with calibrate.sentence_encoder(config) as encoder:
            given, asked = (encoder.encode_queries(some) for some in (canaries, [q for seed in SEEDS for q in queries(seed)[:ASKED]]))
        arrays.save(path, np.concatenate([given, asked]))
    both: Vectors = np.load(path)
    return both[: len(canaries)], both[len(canaries) :]


_given: tuple[_Cloud, Texts, Path]


def _ready(cloud: _Cloud, texts: Texts, folder: Path) -> None:
    global _given
    _given = cloud, texts, folder


def _shard(block: tuple[int, range]) -> None:
    (number, rows), (cloud, texts, folder) = block, _given
    path = folder / f"vectors-{number:05d}.npy"
    if path.exists():
        return
    arrays.save(folder / keys_name(number), keys_of([str(row) for row in rows], texts.contents(rows)))
    unfinished = folder / f"{number}.tmp"
    arrays.save(unfinished, cloud.vectors(number, rows))
    unfinished.rename(path)


def publish(config: Config, workspace: Workspace) -> None:
    """Publish the embeddings again with what was drawn.

    Needs the artifact of the stage embed with encoder.vectors=false, whose encoder and canaries it takes.
    """
    folder, drawn = workspace.folder("embed"), workspace.root / _DRAWN
    found, rows = manifest.load(folder, verify=False), manifest.load(workspace.folder("corpus"), verify=False).counts["passages"]
    shutil.copytree(folder / ENCODER, drawn / ENCODER, dirs_exist_ok=True)
    (drawn / _ENCODED).unlink()
    placed, sections = located(config, workspace.root), STAGES["embed"].sections
    parents = {"corpus": manifest.load(workspace.folder("corpus"), verify=False)}
    with manifest.publish(folder, "embed", config_hash(placed, sections), parents, parameters(placed, sections)) as staging:
        for path in (path for path in drawn.rglob("*") if path.is_file()):
            (staging.path / path.relative_to(drawn)).parent.mkdir(exist_ok=True)
            place(path, staging.path / path.relative_to(drawn))
        staging.counts |= {"vectors": rows, "shards": len(_blocks(rows, config.encoder.shard_rows)), "dim": config.encoder.dim}
        staging.facts |= found.facts
    shutil.rmtree(drawn)


@dataclass(frozen=True)
class _Cloud:
    """Clusters [n, dim], how their sizes add up [n], their directions [64, 24, dim], noise [m, dim], and single rows with given vectors."""

    centres: Vectors
    ends: npt.NDArray[np.float64]
    bases: Vectors
    noise: Vectors
    planted: Rows
    given: Vectors

    @classmethod
    def drawn(cls, rows: int, asked: Vectors, known: Rows, given: Vectors) -> _Cloud:
        """Draw all that the vectors of single files are drawn from, for questions of the vectors `asked`; the rows `known` are `given`."""
        draw, count, dim = np.random.default_rng(0), max(1, rows // _A_CLUSTER), asked.shape[1]
        asked = asked[: max(1, count // 2)]
        weights = 1 / (np.arange(count) + _FLAT)
        centres = draw.standard_normal((count, dim), np.float32) / np.float32(np.sqrt(dim))
        bases = draw.standard_normal((_BASES, _DIRECTIONS, dim), np.float32)
        falling = 1 / np.sqrt(np.arange(1, _DIRECTIONS + 1))
        bases *= (falling * np.sqrt(_NARROW / (dim * (falling**2).sum())))[:, None].astype(np.float32)
        noise = np.float32(np.sqrt((1 - _NARROW) / dim)) * draw.standard_normal((_POOL, dim), np.float32)
        free = np.setdiff1d(draw.choice(rows, len(asked) + len(known), replace=False), known)[: len(asked)]
        noise_of_rows = np.float32(_NOISE / np.sqrt(dim)) * draw.standard_normal(asked.shape, np.float32)
        near = _unit(np.asarray(asked + noise_of_rows, np.float32))
        # A row lies beside its centre as far as the centre is long.
        own = draw.choice(count, len(asked), replace=False, p=weights / weights.sum())
        ends = np.cumsum(weights / weights.sum())
        cloud = cls(centres, ends, bases, noise, np.concatenate([free, known]), np.concatenate([near, given]))
        centres[own] = np.float32(np.sqrt(2)) * near - cloud._beside(draw, own)
        return cloud

    def vectors(self, number: int, rows: range) -> Vectors:
        """Return the vectors of file `number`, which holds `rows`, at unit length."""
        draw = np.random.default_rng((1, number))
        own = np.minimum(np.searchsorted(self.ends, draw.random(len(rows))), len(self.centres) - 1)
        vectors = self._beside(draw, own)
        vectors += self.centres[own]
        vectors = _unit(vectors)
        mine = (self.planted >= rows.start) & (self.planted < rows.stop)
        vectors[self.planted[mine] - rows.start] = self.given[mine]
        return vectors

    def _beside(self, draw: np.random.Generator, own: Rows) -> Vectors:
        """Return where rows of the clusters `own` lie beside their centres, shape [n, dim]."""
        beside = self.noise[np.resize(draw.permutation(_POOL), len(own))]
        beside *= np.where(draw.random(self.noise.shape[1]) < 0.5, np.float32(-1), np.float32(1))
        along = draw.standard_normal((len(own), _DIRECTIONS), np.float32)
        for base in range(_BASES):
            mine = np.flatnonzero(own % _BASES == base)
            beside[mine] += along[mine] @ self.bases[base]
        return beside


def _unit(vectors: Vectors) -> Vectors:
    """Return the vectors, brought to unit length where they are."""
    vectors /= np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return vectors


def sizes(workspace: Workspace, stages: tuple[str, ...]) -> dict[str, float]:
    """Return the GB of each artifact on disk."""
    return {
        stage: round(sum(entry.size for entry in manifest.load(workspace.folder(stage), verify=False).files) / 1e9, 3) for stage in stages
    }
