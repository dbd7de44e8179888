"""Files of an S3 bucket, by ranged reads of the version that was located. Knows boto3 and leaves credentials to it.

Credentials come from the environment, the profile or the machine's role; without any, requests are anonymous.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from research_rl.config import TransferConfig
from research_rl.data.sources import ChangedError, Remote, TransientError, encoding_suffix, nearest
from research_rl.errors import DataError
from research_rl.process.proxies import botocore_options

__all__ = ["BucketSource"]

_CHUNK = 1 << 18
# Names are listed only to suggest a close one; a bucket may hold millions.
_LISTED = 10_000
# The answer to HEAD has no body, so that its error has the number for a code.
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})
_PASSING = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "429", "408"})


class BucketSource:
    """Objects below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, endpoint: str | None, transfer: TransferConfig) -> None:
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._endpoint, self._transfer = endpoint, transfer

    @property
    def key(self) -> str:
        """Endpoint, bucket and prefix."""
        return f"{self._endpoint or ''} {self.facts['url']}"

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and address in the bucket; the endpoint may be a mirror and says nothing about the content."""
        return {"kind": "s3", "url": f"s3://{self._bucket}/{self._prefix}".rstrip("/")}

    def names(self) -> list[str]:
        """Return the objects below the prefix, at most 10,000."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        with self._sorted_errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, PaginationConfig={"MaxItems": _LISTED}
            )
            return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", ())]

    def locate(self, name: str) -> Remote:
        """Return size, ETag and, where the store keeps one, the sha256 of an object."""
        with self._sorted_errors(name):
            # Without ChecksumMode S3 leaves a stored checksum out.
            head = self._client.head_object(Bucket=self._bucket, Key=self._key(name), ChecksumMode="ENABLED")
        address = self._address(name)
        encoding = encoding_suffix(head.get("ContentEncoding", ""), name, address)
        return Remote(name, address, head["ContentLength"], head.get("ETag", ""), True, _checksum(head), encoding=encoding)

    @contextmanager
    def read(self, remote: Remote, start: int, stop: int | None) -> Generator[Iterator[bytes]]:
        """Open a part of the object, of the located version only."""
        conditions: dict[str, Any] = {"IfMatch": remote.version} if remote.version else {}
        if start or stop not in (None, remote.size):
            conditions["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with self._sorted_errors(remote.name):
            body = self._client.get_object(Bucket=self._bucket, Key=self._key(remote.name), **conditions)["Body"]
            try:
                yield body.iter_chunks(_CHUNK)
            finally:
                body.close()

    @cached_property
    def _client(self) -> Any:
        """One client for all threads; tries are counted by the transfer, so boto's own are off."""
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        timeout = self._transfer.timeout_s
        options: dict[str, Any] = {"connect_timeout": timeout, "read_timeout": timeout, "max_pool_connections": self._transfer.parallel + 1}
        session = boto3.Session()
        if session.get_credentials() is None:
            options["signature_version"] = UNSIGNED
        config = Config(retries={"total_max_attempts": 1}, **options, **botocore_options(self._transfer.proxy))
        # boto3 makes no client without a region; servers other than AWS take any.
        region = session.region_name or "us-east-1"
        try:
            return session.client("s3", endpoint_url=self._endpoint, region_name=region, config=config)
        except ValueError as error:
            raise DataError(f"data.s3_endpoint={self._endpoint!r} is no address ({error}); set data.s3_endpoint=https://host") from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _address(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._key(name)}"

    @contextmanager
    def _sorted_errors(self, name: str) -> Generator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        where = self._address(name) + (f" ({self._endpoint})" if self._endpoint else "")
        try:
            yield
        except ClientError as error:
            self._refuse(error, name, where)
        except (BotoCoreError, HTTPError) as error:
            from botocore.exceptions import ConnectionError as ServiceUnreachable
            from botocore.exceptions import HTTPClientError, IncompleteReadError

            if isinstance(error, (HTTPClientError, IncompleteReadError, ServiceUnreachable, HTTPError)):
                raise TransientError(f"cannot fetch {where}: {error}") from error
            raise DataError(f"cannot fetch {where}: {error}; check data.url, data.s3_endpoint and the AWS_ variables") from error

    def _refuse(self, error: Any, name: str, where: str) -> None:
        code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        # Precondition Failed: the object has another ETag than the one in IfMatch.
        if status == 412:
            raise ChangedError(f"{where} changed while it was fetched") from error
        if status >= 500 or code in _PASSING:
            raise TransientError(f"cannot fetch {where}: {status} {code} {message}") from error
        if code in _MISSING and name:
            raise DataError(
                f"cannot fetch {where}: {message or code}; correct data.url or the file's name{self._near(name, code)}"
            ) from error
        raise DataError(
            f"cannot fetch {where}: {status} {message or code}; check data.url, data.s3_endpoint and the AWS_ variables"
        ) from error

    def _near(self, name: str, code: str) -> str:
        try:
            return "" if code == "NoSuchBucket" else nearest(name, self.names())
        except DataError:  # reading may be allowed where listing is not
            return ""


def _checksum(head: dict[str, Any]) -> tuple[str, str] | None:
    import base64

    value = head.get("ChecksumSHA256")
    # A composite checksum is one of the parts' checksums and ends in their number: it says nothing of the bytes in a row.
    if not value or head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or "-" in value:
        return None
    return "sha256", base64.b64decode(value).hex()
