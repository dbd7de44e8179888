"""A model whose batches run side by side, each on one thread: threads inside one small matrix product wait for each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from research_rl.process.cores import cores

__all__ = ["Threaded"]


class Threaded:
    """Holds threads until it is closed, or as a context manager left; `threads` 0 takes all cores, a device that is no CPU one."""

    def __init__(self, device: Any, threads: int) -> None:
        import torch

        self._threads = 1 if device.type != "cpu" else threads or cores()
        # torch.set_num_threads holds for the calling thread, so every thread of the pool calls it.
        self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads once they have done what they have begun; nothing can be computed after it."""
        self._pool.shutdown(cancel_futures=True)
