"""What corpus, embeddings and index will take: bytes on disk, peak memory, time. Knows sizes and rates; builds nothing.

Times are CPU-seconds of one core by a rate measured on this machine: a short calibration with the stages' own code, kept
in the cache folder. An encoder that is not here is reckoned from its shape and the machine's matrix product rate.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from research_rl.config import Config
from research_rl.errors import ConfigError
from research_rl.pipeline.run import standing
from research_rl.pipeline.stages import STAGES, Workspace

if TYPE_CHECKING:
    from research_rl.index.budget import Terms

__all__ = ["CHARS", "ResourceEstimate", "estimates", "refuse", "service", "table"]

KNOWN = {"wiki18_100w": 21_015_324, "psgs_w100": 21_015_324, "nq_corpus": 3_200_000}
"""Passages of public corpora, by a part of their file name."""
CHARS = 680
"""Bytes a passage of 100 words takes with its id, where the corpus is not here yet."""
_MEASURED = 2
"""Counts up when a rate comes to measure something else: kept rates of before are not taken."""
_GIB = 1024**3
_MIB = 1024**2


@dataclass(frozen=True)
class ResourceEstimate:
    """What a stage takes: bytes on disk and of memory, CPU-seconds, and where the rate comes from."""

    stage: str
    disk: float
    memory: float
    seconds: float
    rate: str


def passages(config: Config, workspace: Workspace) -> int | None:
    """Return how many passages the corpus has: by the raw snapshot, else by the table of known corpora."""
    if snapshot := standing("download", config, workspace):
        return snapshot.counts.get("corpus")
    if config.data.source == "generated":
        return None
    return next((rows for name, rows in KNOWN.items() if name in config.data.corpus), None)


def estimates(config: Config, workspace: Workspace, rows: int) -> list[ResourceEstimate]:
    """Return the estimates of corpus, embed and index. Raises ConfigError for an index that faiss refuses."""
    from research_rl.embedding.standing import KEY_BYTES
    from research_rl.index import budget

    config = _settled(config, rows)
    text, terms = _text_bytes(config, workspace, rows), _terms(config, workspace)
    rates = _Rates(config, workspace)
    dim = _width(config)
    encoded = rows if dim and config.encoder.vectors else 0
    sizes = {"corpus": rows * (text + 16), "embed": encoded * (dim * 4.0 + KEY_BYTES), "index": budget.disk(config.index, dim, rows, terms)}
    read = {"corpus": rows * text, "embed": sizes["corpus"], "index": sizes["corpus"] + sizes["embed"]}
    corpus = ResourceEstimate("corpus", sizes["corpus"], budget.corpus_peak(config.corpus, text), *rates("corpus", rows, read["corpus"]))
    peak = budget.embed_peak(config.encoder, dim, encoded)
    embed = ResourceEstimate("embed", sizes["embed"], peak, *rates("embed", encoded, read["embed"]))
    peak = budget.peak(config.index, dim, rows, terms, config.encoder)
    index = ResourceEstimate("index", sizes["index"], peak, *rates("index", rows, read["index"]))
    return [corpus, embed, index]


def service(config: Config, rows: int) -> str:
    """Return what the retriever will hold in memory and read from disk, as one line."""
    from research_rl.index import budget

    limit, workers, index, dim = config.retriever.memory_gib, config.retriever.workers, _settled(config, rows).index, _width(config)
    if index.kind == "bm25" or index.prebuilt:
        return f"service: index.kind={index.kind}, whose files are mapped into memory"
    need = budget.served(index, config.encoder, dim, rows, workers) / _GIB
    shared = f", {workers} workers that share one index" if workers > 1 else ""
    vectors = f", {rows * dim * 4 / 1e9:,.1f} GB of vectors on disk for {index.candidates} candidates a query" if index.refine else ""
    return f"service: {need:,.2f} GiB of retriever.memory_gib={limit:g}, index.factory={index.factory}{vectors}{shared}"


def table(stages: list[ResourceEstimate], rows: int) -> list[str]:
    """Return the estimates as lines of text."""
    lines = [f"knowledge side: {rows:,} passages", f"{'stage':<8}{'disk':>12}{'peak memory':>14}{'time, one core':>16}  rate"]
    for estimate in stages:
        hours = f"{estimate.seconds:,.0f} s" if estimate.seconds < 7200 else f"{estimate.seconds / 3600:,.1f} h"
        lines.append(f"{estimate.stage:<8}{estimate.disk / 1e9:>9,.2f} GB{estimate.memory / _GIB:>10,.2f} GiB{hours:>16}  {estimate.rate}")
    return lines


def refuse(stages: list[ResourceEstimate], config: Config, workspace: Workspace) -> None:
    """Raise ConfigError when what is still to be built does not fit on the disk, in memory or in index.memory_gib."""
    import psutil

    # What stands takes no more room.
    unbuilt = [estimate for estimate in stages if not standing(estimate.stage, config, workspace)]
    need, free = sum(estimate.disk for estimate in unbuilt), shutil.disk_usage(_existing(workspace.root)).free
    if need > free:
        raise ConfigError(
            f"{', '.join(estimate.stage for estimate in unbuilt)} need {need / 1e9:.1f} GB on disk, "
            f"{free / 1e9:.1f} GB are free at {workspace.root}; "
            "free some room, or lower what a vector takes (index.factory, encoder.dim)"
        )
    for estimate in unbuilt:
        have = psutil.virtual_memory().total
        if estimate.memory > have:
            raise ConfigError(
                f"stage {estimate.stage} needs {estimate.memory / _GIB:.1f} GiB of memory, this machine has {have / _GIB:.1f}; "
                "lower index.memory_gib, index.shard_rows or encoder.batch_tokens"
            )


def _width(config: Config) -> int:
    from research_rl.planning import calibrate

    return 0 if config.encoder.kind == "none" else calibrate.width(config.encoder)


def _settled(config: Config, rows: int) -> Config:
    """Return the configuration with the index that `index.factory=auto` stands for."""
    from research_rl.index import auto

    chosen = auto.settled(config.index, config.encoder, config.retriever.memory_gib, _width(config), rows)
    return config.model_copy(update={"index": chosen})


def _text_bytes(config: Config, workspace: Workspace, rows: int) -> float:
    """Return the bytes that a passage takes on disk: of the corpus built, else of the raw file, else of a passage of 100 words."""
    if corpus := standing("corpus", config, workspace):
        return sum(entry.size for entry in corpus.files) / max(rows, 1)
    if snapshot := standing("download", config, workspace):
        return sum(entry.size for entry in snapshot.files if "corpus" in entry.path) / max(rows, 1)
    return CHARS


def _terms(config: Config, workspace: Workspace) -> Terms:
    """Return what is known of the corpus's terms: of the corpus built, else of the beginning of the raw file, else those of English."""
    from research_rl.corpus.store import PassageStore
    from research_rl.data import flashrag
    from research_rl.data.download import CORPUS
    from research_rl.index import bm25, budget

    if config.index.kind == "dense":
        return budget.ENGLISH
    if corpus := standing("corpus", config, workspace):
        return bm25.sampled(PassageStore(workspace.folder("corpus"), corpus))
    if standing("download", config, workspace):
        passages = flashrag.read_passages(workspace.folder("download") / CORPUS)
        return bm25.counted(passage.contents for passage in islice(passages, bm25.SAMPLE))
    return budget.ENGLISH


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


class _Rates:
    """CPU-seconds a passage takes in a stage, measured once for a machine and a configuration of that stage."""

    def __init__(self, config: Config, workspace: Workspace) -> None:
        from research_rl.paths import cache_folder

        self._config, self._workspace = config, workspace
        self._path = cache_folder() / "rates.json"
        try:
            self._known: dict[str, float] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def __call__(self, stage: str, rows: int, read: float) -> tuple[float, str]:
        """Return the seconds of `rows` passages and of checking the `read` bytes of the parents, and where the rate comes from."""
        if not rows:
            return 0.0, "nothing to do"
        from research_rl.planning import calibrate

        # Starting up and comparing the parents' bytes, which plans left out were 1.29 times too low (docs/experiments.md).
        before = calibrate.verified(read)
        # The stage's own section and the encoder decide its rate; the rest of the configuration would only miss the cache.
        section = STAGES[stage].sections[-1]
        key = f"{stage}.{_MEASURED}/{calibrate.machine()}/{self._config.model_dump_json(include={section, 'encoder'})}"
        if calibrate.shaped(self._config.encoder, stage):
            return before + rows * calibrate.by_shape(self._config.encoder), "reckoned: the encoder's shape at this machine's matrix rate"
        if key not in self._known:
            self._keep(key, calibrate.measure(stage, self._config, calibrate.texts(self._workspace)))
        return before + rows * self._known[key], f"measured here: {1 / self._known[key]:,.0f} passages per CPU-second"

    def _keep(self, key: str, rate: float) -> None:
        self._known[key] = rate
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Plans of several workspaces share this file.
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self._known))
        temporary.replace(self._path)
