"""Files of a web server: one ranged request tells what a file is, further ones bring its bytes. Knows HTTP, no file system.

Invariant: a range is taken only from the version that was located (If-Range, and the total in Content-Range).
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

import httpx

from research_rl.config import TransferConfig
from research_rl.config.addresses import public
from research_rl.data.sources import ChangedError, Remote, TransientError, encoding_suffix
from research_rl.errors import DataError
from research_rl.process.proxies import httpx_options
from research_rl.process.redirects import STAY_OUTSIDE

__all__ = ["HttpSource", "Web"]

# Request Timeout, Too Early, Too Many Requests.
_PASSING = frozenset({408, 425, 429})
_LONGEST_WAIT_S = 60.0
# A range counts bytes of the file as it is stored; compressed for the way it would count others.
_PLAIN = {"Accept-Encoding": "identity"}


class HttpSource:
    """Files below one address; a query in the address goes with every request. Credentials come from ~/.netrc or the file NETRC names."""

    def __init__(self, root: str, transfer: TransferConfig) -> None:
        self._parts = urlsplit(root)
        self._web = Web(transfer, auth=_netrc())

    @property
    def key(self) -> str:
        """The root address without credentials and query."""
        return public(urlunsplit(self._parts))

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and root address."""
        return {"kind": "http", "url": self.key}

    def names(self) -> list[str]:
        """Return nothing: a web server has no list of its files."""
        return []

    def locate(self, name: str) -> Remote:
        """Ask for the first byte: size, version and whether ranges work come from the reply."""
        # Not HEAD, which does not show whether ranges work and which addresses signed for GET refuse.
        with self._web.get(self._url(name), {"Range": "bytes=0-0"}, name) as reply:
            return described(reply, name, public(self._url(name)))

    @contextmanager
    def read(self, remote: Remote, start: int, stop: int | None) -> Generator[Iterator[bytes]]:
        """Open a part of the file, of the located version only."""
        with self._web.range(self._url(remote.name), remote, start, stop, _condition(remote)) as body:
            yield body

    def _url(self, name: str) -> str:
        path, _, query = name.partition("?")
        # `%` is left alone: a configured name may be escaped already.
        whole = f"{self._parts.path.rstrip('/')}/{quote(path, safe='/%')}"
        return urlunsplit((self._parts.scheme, self._parts.netloc, whole, query or self._parts.query, ""))


class Web:
    """HTTP requests whose failures are sorted into passing and lasting ones; safe to share between threads."""

    def __init__(self, transfer: TransferConfig, headers: Callable[[], Mapping[str, str]] = dict, auth: httpx.Auth | None = None) -> None:
        self._client = httpx.Client(
            timeout=transfer.timeout_s,
            follow_redirects=True,
            auth=auth,
            event_hooks=STAY_OUTSIDE,
            **httpx_options(transfer.proxy),
        )
        self._headers = headers

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str], name: str) -> Generator[httpx.Response]:
        """Open a reply with status 2xx or 416. Raises TransientError (also from inside the block) and DataError."""
        where = public(url)
        try:
            with self._client.stream("GET", url, headers={**_PLAIN, **self._headers(), **headers}) as reply:
                # 416 is the answer to a request for the first byte of an empty file.
                if reply.status_code != 416 and not reply.is_success:
                    _refuse(reply, where, name)
                yield reply
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise DataError(f"cannot fetch {where}: {error}; correct the address") from None
        except httpx.TooManyRedirects as error:
            raise DataError(f"cannot fetch {where}: {error}; name the address it leads to") from None
        except httpx.TransportError as error:
            raise TransientError(f"cannot fetch {where}: {_reason(error)}") from error

    @contextmanager
    def range(self, url: str, remote: Remote, start: int, stop: int | None, condition: Mapping[str, str]) -> Generator[Iterator[bytes]]:
        """Open the bytes `start` to `stop` - 1 of `remote`. Raises ChangedError when the reply is of another version."""
        whole = start == 0 and stop in (None, remote.size)
        # A whole file is asked for without a range, so that servers that know none can send it.
        conditions = {} if whole else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}", **condition}
        with self.get(url, conditions, remote.name) as reply:
            _fitting(reply, remote, start, whole)
            # Raw: a Content-Encoding is undone when the file is read, so that sizes, ranges and hashes are those of the stored bytes.
            yield reply.iter_raw(1 << 16)


def described(reply: httpx.Response, name: str, address: str) -> Remote:
    """Return what the reply to a request for the first byte says about the file."""
    total = _total(reply)
    ranges = reply.status_code in (206, 416) and total is not None
    # Beside a Transfer-Encoding a Content-Length means nothing (RFC 9112, section 6.3).
    if not ranges and "Content-Length" in reply.headers and "Transfer-Encoding" not in reply.headers:
        total = int(reply.headers["Content-Length"])
    version = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
    encoding = encoding_suffix(reply.headers.get("Content-Encoding", ""), name, address)
    return Remote(name, address, total, version, ranges, encoding=encoding)


def _total(reply: httpx.Response) -> int | None:
    total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", reply.headers.get("Content-Range", ""))
    return int(total[1]) if total else None


def _netrc() -> httpx.Auth | None:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return httpx.NetRCAuth(str(path)) if path.is_file() else None
    except netrc.NetrcParseError as error:
        raise DataError(f"{path} is no netrc file (line {error.lineno}: {error.msg}); correct it or name another one by NETRC") from None


def _condition(remote: Remote) -> dict[str, str]:
    """If-Range needs a strong ETag or a date; a weak one is compared afterwards."""
    return {"If-Range": remote.version} if remote.version and not remote.version.startswith("W/") else {}


def _fitting(reply: httpx.Response, remote: Remote, start: int, whole: bool) -> None:
    version = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
    changed = bool(remote.version and version and version != remote.version and remote.ranges)
    if not whole:
        total = _total(reply)
        # A server without versions betrays a change by the length at least.
        changed |= reply.status_code != 206 or total != remote.size
        begins = reply.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not changed and not begins:
            raise TransientError(f"{remote.address} answered the wrong range {reply.headers.get('Content-Range')!r} for byte {start:,}")
    if changed:
        raise ChangedError(
            f"{remote.address} changed while it was fetched ({remote.version or 'no version'} before, {version or 'none'} now)"
        )


def _refuse(reply: httpx.Response, where: str, name: str) -> NoReturn:
    status = f"{reply.status_code} {reply.reason_phrase}"
    if reply.status_code >= 500 or reply.status_code in _PASSING:
        after = reply.headers.get("Retry-After", "")
        # Retry-After may be a date as well; the usual pause has to do then.
        raise TransientError(f"cannot fetch {where}: {status}", min(float(after), _LONGEST_WAIT_S) if after.isdigit() else 0.0)
    remedy = "give access to it" if reply.status_code in (401, 403) else "correct data.url or the file's name in data.*"
    raise DataError(f"cannot fetch {where}, file {name}: {status}; {remedy}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
