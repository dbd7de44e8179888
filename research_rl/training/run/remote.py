"""Copy sealed checkpoints to S3 while training goes on, and bring the newest back to an empty machine. Knows files and keys only.

Invariants: (1) training never waits for S3 and never fails because of it; (2) a checkpoint's seal is uploaded last, so that
what has one there is whole; (3) what is being copied keeps a name of its own, so pruning cannot pull it away. The metrics up to
a checkpoint lie beside its files, the episodes of every step in a folder of their own: a restored run has no gap.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.errors import ConfigError, ServiceError
from research_rl.process.proxies import botocore_options
from research_rl.training.run.checkpoints import SEAL, Checkpoint, fault, link
from research_rl.training.run.metrics_log import MetricsLog

__all__ = ["Store", "Uploader", "restore"]

_METRICS = "metrics.jsonl"
_ROLLOUTS = "rollouts"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# S3 takes 10,000 parts at most: parts of this size carry files of up to 625 GiB.
_PART_BYTES = 64 << 20

Told = Callable[[str], None]
"""Called with one line for people."""


@dataclass(frozen=True)
class Store:
    """A place in S3: `s3://bucket/prefix`. Endpoint and credentials come from boto3's own variables (AWS_ENDPOINT_URL, ...)."""

    bucket: str
    prefix: str
    proxy: str | None = None

    @classmethod
    def parse(cls, address: str, run: str, proxy: str | None = None) -> Store:
        """Return the place of one run below `s3://bucket/prefix`. Raises ConfigError."""
        scheme, _, rest = address.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise ConfigError(f"trainer.upload={address!r} is not of the form s3://bucket/prefix; correct it or leave it empty")
        return cls(bucket, "/".join(filter(None, (prefix.strip("/"), run))), proxy)

    def key(self, folder: str, name: str) -> str:
        """Return the key of one file below a folder of this run."""
        return f"{self.prefix}/{folder}/{name}"

    def client(self) -> Any:
        """Return a boto3 client that gives up on a silent server within a minute."""
        import boto3
        from botocore.config import Config

        limits: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
        return boto3.Session().client("s3", config=Config(**limits, **botocore_options(self.proxy)))

    def sealed(self, client: Any) -> dict[int, dict[str, Any]]:
        """Return the files of every whole checkpoint there, by step, as its seal lists them."""
        files: dict[int, dict[str, Any]] = {}
        for key in self._keys(client):
            folder, _, name = key.removeprefix(f"{self.prefix}/").partition("/")
            if name == SEAL and folder.startswith("global_step_"):
                body = client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
                files[int(folder.rpartition("_")[2])] = json.loads(body)["files"]
        return files

    def holds(self) -> list[int]:
        """Return the steps of the whole checkpoints there. Raises ServiceError."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return sorted(self.sealed(self.client()))
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise ServiceError(f"trainer.upload: s3://{self.bucket}/{self.prefix} cannot be read: {error}") from error

    def remove(self, client: Any, step: int) -> None:
        """Delete a checkpoint, its seal first."""
        folder = f"global_step_{step}"
        for name in sorted(self.names(client, folder), key=lambda name: name != SEAL):
            client.delete_object(Bucket=self.bucket, Key=self.key(folder, name))

    def names(self, client: Any, folder: str) -> list[str]:
        """Return the names of the files below a folder of this run."""
        return [key.removeprefix(self.key(folder, "")) for key in self._keys(client, f"{folder}/")]

    def _keys(self, client: Any, below: str = "") -> Iterator[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/{below}")
        for page in pages:
            yield from (entry["Key"] for entry in page.get("Contents", []))


class Uploader:
    """One background thread that copies each offered checkpoint of the run in `work` to `store` and keeps the newest `keep` there."""

    def __init__(self, store: Store, work: Path, keep: int, tell: Told) -> None:
        self._store, self._work_folder, self._keep, self._tell = store, work, keep, tell
        self._folder = work / "upload"
        self._folder.mkdir(exist_ok=True)
        self._offers: queue.Queue[Checkpoint | None] = queue.Queue()
        self._stopping = threading.Event()
        self.sent: list[int] = []
        # What an earlier process could not send any more.
        for left in sorted(self._folder.glob("global_step_*")):
            self._offers.put(Checkpoint(int(left.name.rpartition("_")[2]), left))
        self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Take a sealed checkpoint; its files get a second name at once and may be pruned under the first."""
        copy = self._folder / checkpoint.path.name
        if not copy.exists():
            temporary = self._folder / f".{checkpoint.path.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            link(checkpoint.path, temporary)
            if (self._work_folder / _METRICS).is_file():
                link(self._work_folder / _METRICS, temporary / _METRICS)
            # Named when complete: a kill before leaves nothing that the next start would send.
            temporary.rename(copy)
        self._offers.put(Checkpoint(checkpoint.step, copy))

    def close(self, wait_s: float) -> bool:
        """Finish what was offered, for at most `wait_s` seconds; return whether all of it arrived. What did not is kept."""
        self._offers.put(None)
        self._thread.join(wait_s)
        self._stopping.set()
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (checkpoint := self._offers.get()) is not None:
            if self._send(checkpoint):
                shutil.rmtree(checkpoint.path, ignore_errors=True)

    def _send(self, checkpoint: Checkpoint) -> bool:
        """Copy one checkpoint, trying again until it arrives or the run is over."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        pause = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                self._copy(self._store.client(), checkpoint)
            except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
                self._tell(f"checkpoint of step {checkpoint.step} is not in S3 yet: {error}; again in {pause:g} s")
                # Not `sleep`: the end of the run ends the pause.
                self._stopping.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            self.sent.append(checkpoint.step)
            return True
        return False

    def _copy(self, client: Any, checkpoint: Checkpoint) -> None:
        there = self._store.sealed(client)
        if checkpoint.step not in there:
            # The episodes before the seal, which promises that a run restored from here has no gap.
            rollouts = self._work_folder / _ROLLOUTS
            for name in sorted(set(_names(rollouts)) - set(self._store.names(client, _ROLLOUTS))):
                self._put(client, rollouts / name, self._store.key(_ROLLOUTS, name))
            for name in sorted(_names(checkpoint.path), key=lambda name: (name == SEAL, name)):
                self._put(client, checkpoint.path / name, self._store.key(checkpoint.path.name, name))
        for step in sorted({*there, checkpoint.step})[: -self._keep]:
            self._store.remove(client, step)

    def _put(self, client: Any, path: Path, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        options = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
        client.upload_file(str(path), self._store.bucket, key, Config=options)


def _names(folder: Path) -> list[str]:
    # Files that end in .tmp are being written.
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]


def restore(store: Store, work: Path, checkpoints: Path, newer_than: int, at_most: int, tell: Told) -> Checkpoint | None:
    """Fetch the newest whole checkpoint of a later step than `newer_than`, with the run's metrics and episodes; None when there is none.

    It is compared with its seal before it counts. An unreachable or damaged store costs a message, not the run.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = store.client()
        for step, files in sorted(store.sealed(client).items(), reverse=True):
            if not newer_than < step <= at_most:
                continue
            started = time.monotonic()
            why = _fetch(store, client, step, files, checkpoints)
            if why is None:
                _fetch_records(store, client, step, checkpoints / f"global_step_{step}", work)
                tell(f"checkpoint of step {step} came from S3 in {time.monotonic() - started:.1f} s")
                return Checkpoint(step, checkpoints / f"global_step_{step}")
            tell(f"checkpoint of step {step} in S3 is passed over: {why}")
    except (Boto3Error, BotoCoreError, ClientError, OSError, ValueError, KeyError) as error:
        tell(f"no checkpoint could be fetched from S3: {error}")
    return None


def _fetch(store: Store, client: Any, step: int, files: dict[str, Any], folder: Path) -> str | None:
    name = f"global_step_{step}"
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for file in (*files, SEAL):
        _get(store, client, store.key(name, file), temporary / file)
    if why := fault(temporary, verify=True):
        shutil.rmtree(temporary)
        return why
    # A folder of that name is not whole: else its step would be the newest here and would not be fetched.
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    return None


def _fetch_records(store: Store, client: Any, step: int, checkpoint: Path, work: Path) -> None:
    """Bring the metrics up to `step` and the episodes of its steps; what is there already stays."""
    if MetricsLog(work / _METRICS).last < step and _METRICS in store.names(client, checkpoint.name):
        _get(store, client, store.key(checkpoint.name, _METRICS), work / _METRICS)
    for name in store.names(client, _ROLLOUTS):
        target = work / _ROLLOUTS / name
        if int(target.name.partition(".")[0]) <= step and not target.exists():
            _get(store, client, store.key(_ROLLOUTS, name), target)


def _get(store: Store, client: Any, key: str, target: Path) -> None:
    """Download one object; boto3 writes beside the target and renames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(store.bucket, key, str(target))
