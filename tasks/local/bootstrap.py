"""`python -m tasks.local.bootstrap`: make the servers of infra/compose.yaml ready for work, once they answer. Starts no server.

Takes addresses and keys from the environment, as every client does. Doing it again changes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import httpx

from research_rl.errors import ResearchError, ServiceError
from research_rl.process.proxies import httpx_options
from research_rl.terminal import say
from tasks.local.deploy import deploy, make_bucket

__all__ = ["main", "wait"]

_EVERY_S = 2.0
_WAIT_S = 600.0
_S3 = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


def wait(url: str, deadline_s: float) -> None:
    """Return once `url` answers with success. Raises ServiceError after `deadline_s`."""
    until, failure = time.monotonic() + deadline_s, "no answer"
    while time.monotonic() < until:
        try:
            if (reply := httpx.get(url, timeout=10.0, **httpx_options())).is_success:
                return
            failure = f"HTTP {reply.status_code}"
        except httpx.HTTPError as error:
            failure = str(error) or type(error).__name__
        time.sleep(_EVERY_S)
    raise ServiceError(f"{url} does not answer after {deadline_s:g} s ({failure}); see the log of that server, or raise --wait-s")


def _prepared(env: Mapping[str, str], workspace: PurePosixPath, wait_s: float) -> None:
    if not (url := env.get("PREFECT_API_URL")):
        raise ServiceError("PREFECT_API_URL is not set; set it to the address of Prefect's API, such as http://prefect:4200/api")
    wait(f"{url.rstrip('/')}/health", wait_s)
    if all(name in env for name in _S3):
        make_bucket(env)
    deploy({}, workspace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait, then make bucket, pools, deployments and automations; return the exit code."""
    parser = argparse.ArgumentParser("tasks.local.bootstrap", description="Pools, deployments, automations and bucket of running servers.")
    parser.add_argument("--workspace", type=PurePosixPath, default=PurePosixPath("/workspace"), help="where the workers find params.yaml")
    parser.add_argument("--wait-s", type=float, default=_WAIT_S, help=f"how long Prefect may take to answer (default: {_WAIT_S:g})")
    options = parser.parse_args(arguments)
    try:
        _prepared(os.environ, options.workspace, options.wait_s)
    except ResearchError as error:
        say(f"bootstrap: {error}", sys.stderr)
        return 1
    print("bootstrap: pools, deployments, automations and bucket stand")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
