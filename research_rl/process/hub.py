"""The Hugging Face hub for every stage: one address, one kind of client, whole repositories. Knows huggingface_hub; knows no stage.

A token comes from HF_TOKEN or the hub's own login. It goes through no proxy but the configured one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from research_rl.config import TransferConfig
from research_rl.errors import ServiceError
from research_rl.process.proxies import httpx_options
from research_rl.process.redirects import stay_outside

__all__ = ["cached", "connect", "snapshot"]

_PUBLIC = "https://huggingface.co"


def connect(transfer: TransferConfig) -> str:
    """Have huggingface_hub send its requests as `transfer` says; return the hub's address."""
    import httpx
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    # hf-xet fetches large files by a client of its own, which goes through the proxy of HTTPS_PROXY and can be given no other.
    constants.HF_HUB_DISABLE_XET = True
    hooks = default_client_factory().event_hooks
    # The library also goes to an address that a reply only named, without the client's redirects; so each reply is looked at.
    hooks = {**hooks, "response": [*hooks.get("response", []), stay_outside]}
    set_client_factory(lambda: httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=None, **httpx_options(transfer.proxy)))
    return (transfer.hub_endpoint or os.environ.get("HF_ENDPOINT") or _PUBLIC).rstrip("/")


def snapshot(
    repository: str, revision: str, transfer: TransferConfig, cache: Path, *, only: Sequence[str] | None = None, without: Sequence[str] = ()
) -> Path:
    """Return the folder with the files of a model repository at one commit, whose name is the folder's.

    `only` and `without` are patterns of file names. Raises ServiceError with the reason in one line.
    """
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    address = connect(transfer)
    allowed, ignored = list(only) if only else None, list(without) or None
    try:
        return Path(
            str(
                snapshot_download(
                    repository, revision=revision, endpoint=address, cache_dir=cache, allow_patterns=allowed, ignore_patterns=ignored
                )
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(f"{address} does not give {repository} at {revision} ({reason})") from error


def cached(repository: str, revision: str, cache: Path) -> Path | None:
    """Return the folder that an earlier `snapshot` into `cache` left; None when there is none. Asks no server."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(str(snapshot_download(repository, revision=revision, cache_dir=cache, local_files_only=True)))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
