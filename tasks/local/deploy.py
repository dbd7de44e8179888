"""Make a Prefect server ready for work: pools, deployments, automations, and a bucket. Knows addresses from the environment it is given.

Invariant: everything is named, so that doing it again changes nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT, PYTHON
from research_rl.process import proxies

__all__ = ["BUCKET", "deploy", "make_bucket", "with_workspace"]

BUCKET = "research-rl"
_PREFECT = Path(PYTHON).parent / "prefect"
_FILE = "prefect.yaml"


def deploy(env: Mapping[str, str], workspace: PurePosixPath | None = None) -> None:
    """Make the work pools, deploy everything in prefect.yaml, and apply the automations. Raises ServiceError.

    With `workspace` the deployments work there and below it, in place of the checkout.
    """
    # In processes of their own: Prefect's client takes address and key from the environment once, when it is imported.
    _run((PYTHON, "-m", "tasks.local.pools"), env)
    with _file(workspace) as path:
        _run((str(_PREFECT), "--no-prompt", "deploy", "--all", "--prefect-file", str(path)), env)
    _run((PYTHON, "-m", "tasks.local.automations"), env)


def with_workspace(project: dict[str, Any], workspace: PurePosixPath) -> dict[str, Any]:
    """Return what prefect.yaml holds with every workspace, of parameters and of triggers, below `workspace`."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: str(workspace / item) if key == "workspace" else moved(item) for key, item in value.items()}
        return [moved(item) for item in value] if isinstance(value, list) else value

    return moved(project)


@contextmanager
def _file(workspace: PurePosixPath | None) -> Generator[Path]:
    if workspace is None:
        yield Path(_FILE)
        return
    with TemporaryDirectory(prefix="research-deploy-") as folder:
        path = Path(folder) / _FILE
        project = yaml.safe_load((CHECKOUT / _FILE).read_text())
        path.write_text(yaml.safe_dump(with_workspace(project, workspace), sort_keys=False))
        yield path


def _run(command: Sequence[str], env: Mapping[str, str]) -> None:
    whole_env = {**os.environ, **env}
    whole_env |= proxies.bypass_loopback(whole_env)
    done = subprocess.run(command, cwd=CHECKOUT, env=whole_env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ServiceError(f"`{' '.join(command[1:])}` ended with code {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}")


def make_bucket(keys: Mapping[str, str]) -> None:
    """Make the bucket unless it is there. Raises botocore's errors."""
    import boto3
    from botocore.config import Config as BotocoreConfig

    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
        config=BotocoreConfig(**proxies.botocore_options()),
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
