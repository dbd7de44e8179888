"""Build and open the vector side of an index: files over ranges of rows, each in the memory planned for it.

Knows faiss, the bf16 scan and the two tiers; knows no text. One training serves all files, so that an inverted file cut into several
answers like one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import faiss

from research_rl.config import IndexConfig
from research_rl.embedding import Vectors
from research_rl.errors import ConfigError
from research_rl.index import bounds
from research_rl.index.gather import Gather
from research_rl.index.kept import StandingFiles, key
from research_rl.index.search import EXACT, Joined, VectorIndex, VectorSearcher, file_name, threads_for
from research_rl.index.tiers import TwoTier
from research_rl.index.vectors import VectorFiles
from research_rl.pipeline.manifest import file_sha256
from research_rl.pipeline.work import Work
from research_rl.process.cores import cores

__all__ = ["build", "learn", "open_vectors", "row_bytes", "write"]

_ADD = 4096
"""Vectors added at once."""
_TRAINED = "trained"
_CHUNK = 1 << 20
"""Bytes that an index is written in at a time."""

Progress = Callable[[str, float], None]
Range = tuple[int, int]


def build(
    work: Work,
    config: IndexConfig,
    vectors: VectorFiles,
    ranges: Sequence[Range],
    progress: Progress,
    digests: Mapping[Path, str],
    standing: StandingFiles,
) -> dict[str, Any]:
    """Build one file a range of rows as units of `work`; return the facts `open_vectors` needs. Raises ConfigError.

    `digests` has the sha256 of every vector file; a file of `standing` that was made from the very same is kept.
    """
    empty = _trained(work, config, vectors)
    trained = "" if empty is None else file_sha256(work.folder / _TRAINED / _TRAINED)
    keys = [key(config, trained, vectors, digests, span) for span in ranges]
    records: list[dict[str, Any]] = []
    for number, (start, stop) in enumerate(ranges):
        name = keys[number]
        make = (
            partial(_keep, config, standing, name, number)
            if name in standing
            else partial(write, config, empty, vectors, number, start, stop)
        )
        records.append(work.unit(unit(number), make))
        progress(f"{stop:,} of {len(vectors):,} vectors", stop / max(len(vectors), 1))
    facts: dict[str, Any] = {"keys": keys}
    facts |= {"bounds": records} if config.factory == EXACT or config.refine else {}
    return facts | ({"candidates": config.candidates} if config.refine else {})


def _keep(config: IndexConfig, standing: StandingFiles, name: str, number: int, folder: Path) -> dict[str, Any]:
    from research_rl.index.exact import scan_name

    return standing.take(name, folder / (scan_name if config.factory == EXACT else file_name)(number))


def unit(number: int) -> str:
    """Return the name of the unit of work that makes a file."""
    return f"dense-{number:05d}"


def template(config: IndexConfig, dim: int) -> Any:
    """Return the empty index of `index.factory`. Raises ConfigError for a factory or search string that faiss refuses."""
    try:
        index = faiss.index_factory(dim, config.factory, faiss.METRIC_INNER_PRODUCT)
        # Set on the template, since faiss writes search parameters such as nprobe and efSearch into the file.
        if config.search:
            faiss.ParameterSpace().set_index_parameters(index, config.search)
        return index
    except RuntimeError as error:
        raise _refused(config, f"for vectors of {dim} numbers", error) from None


def row_bytes(config: IndexConfig, dim: int) -> float:
    """Return the bytes a vector takes in an index file."""
    if config.factory == EXACT:
        return 2.0 * dim
    index = template(config, dim)
    graph: Any = getattr(index, "hnsw", None)
    if graph is not None:
        links = graph.cum_nb_neighbors(1) + 1  # one vector in M has M links more, on an upper level
        # Four bytes a link; twelve for the vector's level and for where its links begin.
        return index.storage.sa_code_size() + 4.0 * links + 12
    # Inverted lists hold an id of eight bytes beside each code.
    return index.sa_code_size() + 8.0 * (faiss.try_extract_index_ivf(index) is not None)


def _refused(config: IndexConfig, where: str, error: RuntimeError) -> ConfigError:
    reason = (str(error).strip().splitlines() or ["unknown"])[-1]
    return ConfigError(
        f"index.factory={config.factory!r} with index.search={config.search!r} is refused by faiss {where} ({reason}); "
        "use Flat, or a factory string that fits"
    )


def _trained(work: Work, config: IndexConfig, vectors: VectorFiles) -> Any:
    """Return the empty, trained index, as a unit of work of its own: all files share its centroids and codebooks."""
    if config.factory == EXACT:
        return None

    def train(folder: Path) -> dict[str, Any]:
        _save(learn(config, vectors), folder / _TRAINED)
        return {}

    work.unit(_TRAINED, train)
    return faiss.read_index(str(work.folder / _TRAINED / _TRAINED))


def learn(config: IndexConfig, vectors: VectorFiles) -> Any:
    """Return the empty index, trained on a sample where its kind needs it. Raises ConfigError."""
    index = template(config, vectors.dim)
    if index.is_trained:
        return index
    _train_once(config, index)
    moved, sample = _placed(config, index), vectors.take(vectors.spread(config.train_rows))
    faiss.omp_set_num_threads(threads_for(sample.nbytes))
    try:
        moved.train(sample)
    except RuntimeError as error:
        raise _refused(config, f"for {len(vectors):,} vectors of {vectors.dim} numbers", error) from None
    return _returned(config, moved)


def _train_once(config: IndexConfig, index: Any) -> None:
    """Leave out the second training of product quantizers, which gives near centroids near numbers.

    Only a search with `ht` compares numbers; any other replies the same. It takes about 3 CPU-seconds a quantizer of 256 centroids.
    """
    if any(parameter.strip().startswith("ht=") for parameter in config.search.split(",")):
        return
    while index is not None:
        index = faiss.downcast_index(index)
        if hasattr(index, "do_polysemous_training"):
            index.do_polysemous_training = False
        index = getattr(index, "index", None) or getattr(index, "base_index", None)


def write(config: IndexConfig, empty: Any, vectors: VectorFiles, number: int, start: int, stop: int, folder: Path) -> dict[str, Any]:
    """Write file `number` with rows `start` to `stop` - 1: `empty` filled, or their scan where there is none; return its facts."""
    if empty is None:
        from research_rl.index.exact import scan_name, write_scan

        norm, error = write_scan((batch for _, batch in vectors.batches(start, stop, _ADD)), folder / scan_name(number))
        return {"norm": norm, "error": error}
    # Through bytes, because faiss clones no RaBitQ codes for FastScan.
    index = faiss.deserialize_index(faiss.serialize_index(empty))
    _reserve(index, stop - start)
    index = _placed(config, index)
    faiss.omp_set_num_threads(threads_for((stop - start) * vectors.dim * 4))
    # A GPU's index cannot be asked for its parts: its rows are measured by a second pass.
    facts = _filled(index, vectors.batches(start, stop, _ADD), measure=bool(config.refine) and config.device == "cpu")
    index = _returned(config, index)
    _save(index, folder / file_name(number))
    if config.refine and config.device != "cpu":
        return bounds.measured(index, (batch for _, batch in vectors.batches(start, stop, _ADD)))
    return facts


def _filled(index: Any, batches: Iterator[tuple[int, Vectors]], *, measure: bool) -> dict[str, float]:
    """Add batches of rows; return what is known of their codes' errors where it is to be measured."""
    if measure:
        return bounds.filled(index, (batch for _, batch in batches))
    for _, batch in batches:
        index.add(batch)
    return {}


def _save(index: Any, path: Path) -> None:
    """Write an index through Python: faiss's own writer only prints it when the last 4 KiB, which `fclose` writes, find no room.

    Raises OSError.
    """
    with path.open("wb") as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write, _CHUNK))  # pyright: ignore[reportAttributeAccessIssue]


def _reserve(index: Any, rows: int) -> None:
    """Take the room for all codes at once: a vector that grows holds up to three times its size for a moment."""
    storage = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    if isinstance(storage, faiss.IndexFlatCodes):
        storage.codes.resize(rows * storage.code_size)
        # A C++ vector keeps its room when it becomes shorter.
        storage.codes.resize(0)


def _placed(config: IndexConfig, index: Any) -> Any:
    """Return the index where `index.device` wants it. Raises ConfigError where faiss has no GPU to offer."""
    if config.device == "cpu":
        return index
    if not faiss.get_num_gpus():
        raise ConfigError(
            f"index.device=gpu, but this faiss ({faiss.__version__}) sees no GPU; install a faiss build for CUDA on a machine with one, "
            "or set index.device=cpu"
        )
    return faiss.index_cpu_to_all_gpus(index)


def _returned(config: IndexConfig, index: Any) -> Any:
    return index if config.device == "cpu" else faiss.index_gpu_to_cpu(index)


def open_vectors(
    folder: Path,
    facts: dict[str, Any],
    vectors: VectorFiles,
    ranges: Sequence[Range],
    threads: int = 0,
    *,
    numbers: Sequence[int],
    keep: bool = True,
) -> VectorSearcher:
    """Open the files `numbers` of an index folder as one index. Raises ManifestError."""
    scan = facts["factory"] == EXACT
    openers = [
        partial(_open_scan, folder, facts["bounds"][number], vectors, number, ranges[number], threads)
        if scan
        else partial(VectorIndex.open, folder / file_name(number), threads)
        for number in numbers
    ]
    rows = sum(ranges[number][1] - ranges[number][0] for number in numbers)
    # The exact scan has threads of its own.
    side_by_side = 1 if scan else threads or threads_for(rows * vectors.dim * 4)
    joined = Joined(openers, [ranges[number][0] for number in numbers], rows, vectors.dim, side_by_side, keep=keep)
    if scan or "candidates" not in facts:
        return joined
    # One tier of vectors above all files of codes: the candidates of a query are the best of all of them.
    return TwoTier(joined, Gather(vectors), facts["candidates"], cache(partial(_bound, joined, [facts["bounds"][n] for n in numbers])))


def _bound(codes: Joined, records: Sequence[dict[str, float]]) -> bounds.Bound | None:
    """Return the bound of some files' codes, which share their rotation and centre."""
    first = codes.first()
    return bounds.Bound.of(first.faiss_index, records, codes.rows) if isinstance(first, VectorIndex) else None


def _open_scan(folder: Path, bounds: dict[str, float], vectors: VectorFiles, number: int, span: Range, threads: int) -> VectorSearcher:
    from research_rl.index.exact import ExactScan, scan_name

    return ExactScan(folder / scan_name(number), vectors.mapped(*span), bounds["norm"], bounds["error"], threads or cores())
