"""P17: a new snapshot of the corpus with 1 % of its passages changed, removed or added, against a build of it from nothing.

Corpus, embeddings and index, in one process with one encoding thread; the imports of libraries are not counted. Two encoders with
random weights: one of MiniLM's shape, and one without layers, at which next to nothing but the cost besides encoding is left.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.duel import Duel, cpu_seconds
from research_rl.config import Config
from research_rl.corpus import build as corpus
from research_rl.embedding import build as embed
from research_rl.index import build as index
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, measured, silent
from tests.knowledge import checked

SHARE, DIM = 100, 384
"""One passage in so many changes, one in so many goes, one in so many is new: a third of 1 % each."""
Rows = list[dict[str, str]]


def run(quick: bool) -> Iterator[Duel]:
    """Yield one duel an encoder; raises AssertionError when a refreshed artifact is another than that of a build from nothing."""
    for what, layers, rows, goal in (
        ("MiniLM's shape", 6, 1_000 if quick else 4_000, 33.0),
        ("an encoder without layers", 0, 10_000 if quick else 100_000, 1.0),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            yield _duel(Path(scratch), what, layers, rows, goal)


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


def _build(root: Path, rows: Rows, model: Path) -> tuple[dict[str, float], str]:
    """Build what follows the checked data; return CPU-seconds a stage, and what changed."""
    workspace = checked(root, rows)
    config = Config.model_validate(
        {
            "encoder": {"kind": "sentence", "model": str(model), "shard_rows": 8192},
            "encoding": {"threads": 1},
            "index": {"factory": "Exact"},
        }
    )
    taken: dict[str, float] = {}
    for name, stage in (("corpus", corpus), ("embed", embed), ("index", index)):
        parents = {parent: manifest.load(workspace.folder(parent), verify=False) for parent in STAGES[name].parents}
        started = cpu_seconds()
        stage.run(Context(STAGES[name], config, workspace, parents, silent))
        taken[name] = cpu_seconds() - started
    note: dict[str, Any] = measured(workspace, manifest.load(workspace.folder("embed"), verify=False))
    return taken, ", ".join(f"{note[name]:,} {name}" for name in ("added", "changed", "removed", "encoded"))


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
    from transformers import BertConfig, BertModel, BertTokenizerFast

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
