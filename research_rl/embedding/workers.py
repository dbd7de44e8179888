"""Encode shards of passages in this process, in several, or on a Ray cluster. Knows workers; knows no file of an artifact.

Invariants: (1) texts go to a worker and vectors come back, so a cluster needs no shared disk; (2) a batch runs on one
thread wherever it runs, so the same number format on the same kind of processor gives the same bytes; (3) at most two
shards a worker are in memory; (4) a Ray worker that dies costs the shard it was at.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

from research_rl.config import EncodingConfig
from research_rl.embedding import Encoded
from research_rl.embedding.sentence import SentenceEncoder
from research_rl.errors import ServiceError

__all__ = ["encode"]

Read = Callable[[range], list[str]]
Results = Iterator[tuple[range, Encoded]]

# One shard is encoded while the next one waits, so that no worker is idle while a result is written.
_AHEAD = 2
_RETRIES = 3
_CONNECT_S = 10.0
_OBJECT_STORE = 512 << 20
"""Bytes of shared memory for texts, vectors and the model on a cluster started here."""


def encode(
    config: EncodingConfig, encoder: SentenceEncoder, folder: Path, shards: Iterable[range], read: Read, progress: Callable[[int], None]
) -> Results:
    """Yield each shard with its vectors as they are ready. `folder` holds the model of `encoder`; `read` gives a shard's texts.

    Raises ServiceError when workers die or the cluster does not answer.
    """
    if config.engine == "ray":
        return _on_ray(config, encoder.facts, folder, shards, read)
    workers = config.workers or _gpus() or 1
    if workers == 1:
        return ((shard, encoder.encode(read(shard), progress)) for shard in shards)
    return _in_processes(workers, config.threads, encoder.facts, folder, shards, read)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# Several processes


def _in_processes(workers: int, threads: int, facts: dict[str, Any], folder: Path, shards: Iterable[range], read: Read) -> Results:
    import multiprocessing

    # fork would copy torch's thread pools and CUDA context into a state that cannot be used.
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.SimpleQueue()
    # The pool gives its processes no number; each takes one from the queue, by which it finds its GPU.
    for number in range(workers):
        numbers.put(number)
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    queue = iter(shards)
    with ProcessPoolExecutor(workers, spawn, _start, (folder, facts, threads, numbers)) as pool:
        flying: dict[Future[Encoded], range] = {}
        try:
            while True:
                # Texts are read only when there is room for them: that bounds the memory.
                for shard in islice(queue, _AHEAD * workers - len(flying)):
                    flying[pool.submit(_encode_here, read(shard))] = shard
                if not flying:
                    return
                for done in wait(flying, return_when=FIRST_COMPLETED).done:
                    yield flying.pop(done), done.result()
        except BrokenProcessPool as error:
            raise ServiceError(
                f"one of {workers} encoding processes died (out of memory?); finished shards are kept: run the stage again, "
                "with lower encoding.workers or encoder.batch_tokens if it repeats"
            ) from error


_mine: SentenceEncoder | None = None


def _start(folder: Path, facts: dict[str, Any], threads: int, numbers: Any) -> None:
    """Load this process's model, on a GPU of its own where there are any, and end when the parent does."""
    import multiprocessing
    from threading import Thread

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A pool's process waits on its queue and would outlive a parent that is killed.
        parent.join()
        # sys.exit in a thread ends that thread alone.
        os._exit(1)

    Thread(target=follow, daemon=True).start()
    number = numbers.get()
    if gpus := _gpus():
        import torch

        torch.cuda.set_device(number % gpus)
    global _mine
    _mine = SentenceEncoder.load(folder, facts, threads=threads)


def _encode_here(texts: list[str]) -> Encoded:
    assert _mine is not None
    return _mine.encode(texts)


# A Ray cluster


def _on_ray(config: EncodingConfig, facts: dict[str, Any], folder: Path, shards: Iterable[range], read: Read) -> Results:
    with _cluster(config) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        threads = config.threads or 1
        workers = config.workers or gpus or max(1, int(ray.cluster_resources()["CPU"]) // threads)
        task = ray.remote(_encode_there).options(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=_RETRIES)
        # Stored once in the cluster; each task carries a reference of a few bytes.
        model = ray.put({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        queue, flying = iter(shards), dict[Any, range]()
        try:
            while True:
                for shard in islice(queue, _AHEAD * workers - len(flying)):
                    # In a list: Ray would resolve a bare reference for every task, this one is fetched by workers that lack the model.
                    flying[task.remote([model], facts, threads, read(shard))] = shard
                if not flying:
                    return
                for done in ray.wait(list(flying))[0]:
                    yield flying.pop(done), ray.get(done)
        except ray.exceptions.RaySystemError as error:
            raise ServiceError(f"the Ray cluster gave up on a shard ({error}); finished shards are kept: run the stage again") from error


@contextmanager
def _cluster(config: EncodingConfig) -> Generator[Any]:
    """Connect to the cluster, or start one that ends with this block or this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _reach(config.ray_address)
    # The nodes need this package, not a checkout.
    environment = {"py_modules": [str(Path(__file__).parents[1])]}
    options: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False}
    if not config.ray_address:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE, "num_cpus": config.workers or None}
    try:
        ray.init(config.ray_address or "local", **options)
    except (ConnectionError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(f"encoding.ray_address={config.ray_address!r} gives no cluster ({reason}); correct it or start one") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Try the address first: the library itself would try for minutes. Raises ServiceError."""
    import socket

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        raise ServiceError(f"encoding.ray_address={address!r} gives no cluster ({error}); correct it or start one") from error


_loaded: dict[str, SentenceEncoder] = {}
"""Models of this Ray worker by hash: one, as long as the worker serves one build."""


def _encode_there(model: Sequence[Any], facts: dict[str, Any], threads: int, texts: list[str]) -> Encoded:
    """Encode on a Ray worker; `model` holds a reference, so that the files travel only to a worker that lacks them."""
    name = str(facts["model_sha256"])
    if name not in _loaded:
        import ray

        # A worker lives on after a build; the model of the last one must not stay in memory.
        _loaded.clear()
        files: dict[str, bytes] = cast(Any, ray.get(model[0]))
        with tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                target = Path(scratch) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            _loaded[name] = SentenceEncoder.load(Path(scratch), facts, threads=threads)
    return _loaded[name].encode(texts)
