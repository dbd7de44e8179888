"""P17: a new snapshot of the corpus with 1 % of its passages changed, removed or added, against a build of it from nothing.

Corpus, embeddings and index, in one process with one encoding thread; the imports of libraries are not counted. Two encoders with
random weights: one of MiniLM's shape, and one without layers, at which next to nothing but the cost besides encoding is left.
Of a million passages MiniLM's shape takes eight hours: there the vectors of before are drawn, the refresh is measured whole, and
of the build from nothing the encoding is reckoned from a part of the passages.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.duel import Duel, cpu_seconds
from research_rl.config import Config
from research_rl.corpus import build as corpus
from research_rl.embedding import ENCODER, load_encoder
from research_rl.embedding import build as embed
from research_rl.embedding.sentence import SentenceEncoder
from research_rl.embedding.standing import keys_name, keys_of
from research_rl.index import build as index
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, measured, silent
from tests.knowledge import checked

SHARE, DIM = 100, 384
"""One passage in so many changes, one in so many goes, one in so many is new: a third of 1 % each."""
_SHARD_ROWS = 8192
_STAGES = {"corpus": corpus, "embed": embed, "index": index}
Rows = list[dict[str, str]]


def run(quick: bool) -> Iterator[Duel]:
    """Yield one duel an encoder; raises AssertionError when a refreshed artifact is another than that of a build from nothing."""
    for what, layers, rows, goal in (
        ("MiniLM's shape", 6, 1_000 if quick else 4_000, 33.0),
        ("an encoder without layers", 0, 10_000 if quick else 100_000, 1.0),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            yield _duel(Path(scratch), what, layers, rows, goal)
    with tempfile.TemporaryDirectory() as scratch:
        yield _reckoned(Path(scratch), *((20_000, 500) if quick else (1_000_000, 4_000)))


def _duel(scratch: Path, what: str, layers: int, rows: int, goal: float) -> Duel:
    model, draw = _model(scratch / "model", layers), np.random.default_rng(0)
    before = _passages(draw, rows, "p")
    _build(scratch / "kept", before[: rows // 50], model)  # kernels are chosen and pages are there
    _build(scratch / "kept", before, model)
    after = _changed(draw, before)
    ours, changes = _build(scratch / "kept", after, model)
    peer, _ = _build(scratch / "fresh", after, model)
    kept, fresh = (_hashes(scratch / name) for name in ("kept", "fresh"))
    assert kept == fresh, f"refreshed {kept}, from nothing {fresh}"
    note = f"{1e6 * (sum(ours.values()) / rows):,.0f} CPU-us a passage; " + ", ".join(
        f"{stage} {ours[stage]:.2f} of {peer[stage]:.2f}" for stage in ours
    )
    mine, theirs = sum(ours.values()), sum(peer.values())
    return Duel("P17", f"{rows:,} passages, {changes}, {what}", "CPU-seconds", mine, theirs, theirs / mine, goal, 1, note)


def _reckoned(scratch: Path, rows: int, part: int) -> Duel:
    """Return the duel of MiniLM's shape over `rows` passages, of which `part` are encoded to know what all of them take."""
    model, draw = _model(scratch / "model", 6), np.random.default_rng(0)
    before = _passages(draw, rows, "p")
    encoding, _ = _build(scratch / "part", before[:part], model)
    checked(scratch / "kept", before)
    peer = {"corpus": _stage("corpus", scratch / "kept", model), "embed": encoding["embed"] / part * rows}
    after = _changed(draw, before)
    _draw_vectors(Workspace(scratch / "kept"), before, model, {*_asked_at_start(before), *_asked_at_start(after)})
    peer["index"] = _stage("index", scratch / "kept", model)
    ours, changes = _build(scratch / "kept", after, model)
    each = ", ".join(f"{stage} {ours[stage]:.2f} of {peer[stage]:.2f}" for stage in ours)
    note = f"encoding from nothing reckoned from {part:,} passages; {each}"
    mine, theirs = sum(ours.values()), sum(peer.values())
    return Duel("P17", f"{rows:,} passages, {changes}, MiniLM's shape", "CPU-seconds", mine, theirs, theirs / mine, 33.0, 1, note)


def _asked_at_start(rows: Rows) -> list[str]:
    """Return the passages that an index of these rows has to find by their own text."""
    return [rows[row]["contents"] for row in np.linspace(0, len(rows) - 1, 8).astype(int)]


def _draw_vectors(workspace: Workspace, rows: Rows, model: Path, real: set[str]) -> None:
    """Publish embeddings whose vectors are drawn, but for those of the texts `real`, with the encoder that would have made them."""
    _stage("embed", workspace.root, model, vectors=False)
    draw, folder, size = np.random.default_rng(1), workspace.folder("embed"), _SHARD_ROWS
    bare, encoder = manifest.load(folder, verify=False), workspace.root / ENCODER
    shutil.copytree(folder / ENCODER, encoder)
    texts = sorted(real)
    loaded = load_encoder(folder, bare)
    assert isinstance(loaded, SentenceEncoder)
    with loaded:
        known = dict(zip(texts, loaded.encode_passages(texts), strict=True))
    with manifest.publish(folder, "embed", "x", {"corpus": manifest.load(workspace.folder("corpus"), verify=False)}) as staging:
        shutil.copytree(encoder, staging.path / ENCODER)
        for number, start in enumerate(range(0, len(rows), size)):
            some = rows[start : start + size]
            vectors = draw.standard_normal((len(some), DIM), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            for place, row in enumerate(some):
                if row["contents"] in known:
                    vectors[place] = known[row["contents"]]
            np.save(staging.path / f"vectors-{number:05d}.npy", vectors)
            np.save(staging.path / keys_name(number), keys_of([row["id"] for row in some], [row["contents"] for row in some]))
        staging.counts |= {**bare.counts, "vectors": len(rows), "shards": -(-len(rows) // size)}
        staging.facts |= bare.facts


def _build(root: Path, rows: Rows, model: Path) -> tuple[dict[str, float], str]:
    """Build what follows the checked data; return CPU-seconds a stage, and what changed."""
    workspace = checked(root, rows)
    taken = {name: _stage(name, root, model) for name in _STAGES}
    note: dict[str, Any] = measured(workspace, manifest.load(workspace.folder("embed"), verify=False))
    return taken, ", ".join(f"{note[name]:,} {name}" for name in ("added", "changed", "removed", "encoded"))


def _stage(name: str, root: Path, model: Path, *, vectors: bool = True) -> float:
    """Run one stage; return its CPU-seconds."""
    encoder = {"kind": "sentence", "model": str(model), "shard_rows": _SHARD_ROWS, "vectors": vectors}
    config = Config.model_validate({"encoder": encoder, "encoding": {"threads": 1}, "index": {"factory": "Exact"}})
    workspace = Workspace(root)
    parents = {parent: manifest.load(workspace.folder(parent), verify=False) for parent in STAGES[name].parents}
    started = cpu_seconds()
    _STAGES[name].run(Context(STAGES[name], config, workspace, parents, silent))
    return cpu_seconds() - started


def _hashes(root: Path) -> list[str]:
    return [manifest.load(Workspace(root).folder(stage), verify=False).hash[:12] for stage in ("corpus", "embed", "index")]


def _passages(draw: np.random.Generator, count: int, prefix: str) -> Rows:
    words = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ado", "eri", "ilu", "ona", "upe")]
    return [
        {"id": f"{prefix}{number}", "contents": f"{prefix} {number} " + " ".join(draw.choice(words, draw.integers(20, 101)))}
        for number in range(count)
    ]


def _changed(draw: np.random.Generator, rows: Rows) -> Rows:
    """Change, drop and add a third of a hundredth each, anywhere."""
    third = max(1, len(rows) // (3 * SHARE))
    places = draw.choice(len(rows), 2 * third, replace=False)
    changed, gone = set(places[:third].tolist()), set(places[third:].tolist())
    kept = [{**row, "contents": row["contents"] + " anew"} if place in changed else row for place, row in enumerate(rows)]
    return [row for place, row in enumerate(kept) if place not in gone] + _passages(draw, third, "new")


def _model(folder: Path, layers: int) -> Path:
    """Write a model of MiniLM's widths with `layers` layers."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(10)), *(f"##{n}" for n in range(10)), *letters]
    known += [*(f"##{letter}" for letter in letters), *(f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ado", "eri", "ilu", "ona", "upe"))]
    (folder / "vocab.txt").write_text("\n".join(known))
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(known), hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * DIM),
        add_pooling_layer=False,
    ).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=256).save_pretrained(folder)
    # A plain transformers folder says nothing of pooling; its name does.
    return folder.rename(folder.with_name("all-minilm-l6-v2"))
