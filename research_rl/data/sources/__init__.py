"""Where files come from: one interface over folders, hubs, buckets and web servers. Knows addresses; `transfer` moves the bytes.

A source answers what a name stands for (size, version, checksum) and hands out its bytes from any offset. It tries once:
what may succeed later is a TransientError, another version than the one located a ChangedError, the rest a DataError.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from research_rl.config import DataConfig, TransferConfig
from research_rl.errors import ConfigError, DataError

__all__ = ["ChangedError", "FileSource", "Remote", "Sources", "TransientError"]


_SUFFIX_OF = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}


class TransientError(DataError):
    """A transfer failed in a way that may pass; `wait_s` is what the server asked for, 0 when it did not."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ChangedError(DataError):
    """The source holds another version of the file than when it was located."""


@dataclass(frozen=True)
class Remote:
    """What a name stands for at a source.

    `version` is an ETag, a commit or a date, empty when the source has none; `checksum` is (algorithm, hex digest) with
    algorithm sha256 or git-blob; `path` is set for a file that already lies on this machine and is used in place;
    `encoding` is the suffix of a compression that the source applied to the bytes on top of what the name says (Content-Encoding).
    """

    name: str
    address: str
    size: int | None
    version: str
    ranges: bool
    checksum: tuple[str, str] | None = None
    path: Path | None = None
    encoding: str = ""


class FileSource(Protocol):
    """One place that holds files by name."""

    @property
    def key(self) -> str:
        """Text that is the same for the same place; keeps the unfinished work of different places apart."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says about the place: no path of this machine, no secret, no time."""
        ...

    def names(self) -> list[str]:
        """Return the names of all files, empty where the place cannot tell."""
        ...

    def locate(self, name: str) -> Remote:
        """Return what `name` stands for. Raises DataError when it is not there, TransientError when nobody answers."""
        ...

    def read(self, remote: Remote, start: int, stop: int | None) -> AbstractContextManager[Iterator[bytes]]:
        """Open the bytes `start` to `stop` - 1 (None: the end). Raises TransientError, also inside the block, and ChangedError."""
        ...


class Sources:
    """The sources of a configuration: one by default, others where a name is a whole address."""

    def __init__(self, data: DataConfig, transfer: TransferConfig, root: Path) -> None:
        self._data, self._transfer, self._root = data, transfer, root
        self._known: dict[str, FileSource] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the default source."""
        return self._default().facts

    def of(self, name: str) -> tuple[FileSource, str]:
        """Return the source of a configured name and its name there. Raises ConfigError for an unusable one."""
        scheme, separator, rest = name.partition("://")
        if separator:
            return self._addressed(name, scheme, rest)
        # A user's own files may lie anywhere; below a remote root such a name would address something else.
        if self._data.source != "folder" and (name.startswith("/") or ".." in PurePosixPath(name).parts):
            raise ConfigError(f"{name!r} leaves the root of data.source={self._data.source}; name a file below the root or a whole address")
        return self._default(), name

    def _default(self) -> FileSource:
        return self._open("", self._make)

    def _make(self) -> FileSource:
        data, transfer = self._data, self._transfer
        if data.source == "folder":
            from research_rl.data.sources.folder import FolderSource

            return FolderSource.open(data, self._root)
        if data.source == "hub":
            return self._hub(data.hub_repo, data.hub_revision)
        schemes = ("s3",) if data.source == "s3" else ("http", "https")
        scheme, _, rest = (data.url or "").partition("://")
        if scheme not in schemes or not rest:
            raise ConfigError(f"data.url={data.url!r} is no root for data.source={data.source}; set data.url={schemes[-1]}://...")
        if data.source == "s3":
            bucket, _, prefix = rest.partition("/")
            return self._bucket(bucket, prefix)
        from research_rl.data.sources.http import HttpSource

        return HttpSource(f"{scheme}://{rest}", transfer)

    def _addressed(self, name: str, scheme: str, rest: str) -> tuple[FileSource, str]:
        if scheme in ("http", "https"):
            from research_rl.data.sources.http import HttpSource

            root, _, last = name.rpartition("/")
            return self._open(root, lambda: HttpSource(root, self._transfer)), last
        if scheme == "s3":
            bucket, _, key = rest.partition("/")
            return self._open(f"s3://{bucket}", lambda: self._bucket(bucket, "")), key
        parts = rest.split("/", 2)
        if scheme != "hub" or len(parts) < 3:
            raise ConfigError(f"{name!r} is no address; use hub://owner/repository[@revision]/path, s3://bucket/key or https://host/path")
        repository, _, revision = f"{parts[0]}/{parts[1]}".partition("@")
        return self._open(f"hub://{repository}@{revision}", lambda: self._hub(repository, revision or "main")), parts[2]

    def _hub(self, repository: str, revision: str) -> FileSource:
        from research_rl.data.sources.hub import HubSource

        return HubSource(repository, revision, self._transfer)

    def _bucket(self, bucket: str, prefix: str) -> FileSource:
        from research_rl.data.sources.s3 import BucketSource

        return BucketSource(bucket, prefix, self._data.s3_endpoint, self._transfer)

    def _open(self, key: str, make: Callable[[], FileSource]) -> FileSource:
        # One source an address: each keeps its connections, and a hub's its commit.
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def encoding_suffix(content_encoding: str, name: str, address: str) -> str:
    """Return the suffix of the compression that a Content-Encoding names, empty for none. Raises DataError for one that is not read.

    Many servers send a file that is called .gz as it is and name its own compression there; it is not compressed twice.
    """
    codings = [part.strip().lower() for part in content_encoding.split(",")]
    # Some S3 servers hand out aws-chunked, the framing of the upload, as if it were the object's coding.
    codings = [coding for coding in codings if coding not in ("", "identity", "aws-chunked")]
    suffix = _SUFFIX_OF.get(codings[0], "") if len(codings) == 1 else ""
    if codings and not suffix:
        raise DataError(f"{address} is sent with Content-Encoding {content_encoding}; store it plain, or compressed by gzip or zstd")
    return "" if name.partition("?")[0].endswith(suffix) else suffix


def nearest(name: str, names: list[str]) -> str:
    """Return "; did you mean ...?" with the names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, names, 3, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
