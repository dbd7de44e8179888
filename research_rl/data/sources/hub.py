"""Files of a Hugging Face dataset repository, all at the one commit the revision stands for. Knows the hub's API and headers.

The hub's own checksums are used: the sha256 of a large file, the git blob hash of a small one. huggingface_hub locates the
files but does not fetch them: its download starts at byte 0 again after a kill, since it writes to a file of a random name
that it removes, and compares no hash.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from research_rl.config import TransferConfig
from research_rl.data.sources import Remote, TransientError, nearest
from research_rl.data.sources.http import Web
from research_rl.errors import DataError
from research_rl.process.hub import connect

__all__ = ["HubSource"]

# The hub's ETag is the sha256 of a large file and git's SHA-1 of a small one.
_ALGORITHMS = {64: "sha256", 40: "git-blob"}


class HubSource:
    """One dataset repository at one commit; a token is taken from HF_TOKEN or the hub's own login."""

    def __init__(self, repository: str, revision: str, transfer: TransferConfig) -> None:
        self._endpoint, self._repository, self._revision = connect(transfer), repository, revision
        self._timeout = transfer.timeout_s
        self._web = Web(transfer, _headers)

    @property
    def key(self) -> str:
        """Repository and commit."""
        return f"hub:{self._endpoint}/{self._repository}@{self._commit}"

    @property
    def facts(self) -> dict[str, Any]:
        """Kind, repository and commit."""
        return {"kind": "hub", "repository": self._repository, "commit": self._commit}

    def names(self) -> list[str]:
        """Return the repository's files."""
        return [item.rfilename for item in self._info.siblings or ()]

    def locate(self, name: str) -> Remote:
        """Return size and checksum of a file. Raises DataError with close names when the repository lacks it."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import EntryNotFoundError

        try:
            metadata = self._call(name, lambda: get_hf_file_metadata(self._url(name), timeout=self._timeout, endpoint=self._endpoint))
        except DataError as error:
            if isinstance(error.__cause__, EntryNotFoundError) and (near := nearest(name, self.names())):
                raise DataError(f"{error}{near}") from error
            raise
        etag = str(metadata.etag or "").strip('"')
        algorithm = _ALGORITHMS.get(len(etag))
        return Remote(name, unquote(self._url(name)), metadata.size, etag, True, (algorithm, etag) if algorithm else None)

    @contextmanager
    def read(self, remote: Remote, start: int, stop: int | None) -> Generator[Iterator[bytes]]:
        """Open a part of the file; a commit's files never change, so no condition is needed."""
        with self._web.range(self._url(remote.name), _anonymous(remote), start, stop, {}) as body:
            yield body

    @cached_property
    def _info(self) -> Any:
        from huggingface_hub import HfApi

        # Asked once, so that all files are of the commit that the revision stood for at that moment.
        api = HfApi(endpoint=self._endpoint)
        return self._call("", lambda: api.dataset_info(self._repository, revision=self._revision, timeout=self._timeout))

    @property
    def _commit(self) -> str:
        return str(self._info.sha)

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repository, name, repo_type="dataset", revision=self._commit, endpoint=self._endpoint)

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        """Run one hub request; what it raises becomes one error that names address, repository and revision."""
        from httpx import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        where = f"{self._endpoint}/datasets/{self._repository} at {self._revision}" + (f", file {name}" if name else "")
        try:
            return call()
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            status = getattr(getattr(error, "response", None), "status_code", None)
            passing = isinstance(error, (HTTPError, OSError)) if status is None else status >= 500 or status in (408, 429)
            kind = TransientError if passing else DataError
            raise kind(
                f"cannot fetch {where}: {reason}; check transfer.hub_endpoint, data.hub_repo, data.hub_revision and the network, "
                "or put the files in a folder and set data.source=folder"
            ) from error


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers()


def _anonymous(remote: Remote) -> Remote:
    """Without the version: the store behind the hub answers with an ETag of its own."""
    return Remote(remote.name, remote.address, remote.size, "", remote.ranges)
