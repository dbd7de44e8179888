"""`python -m tasks.tracking.lookup NAME`: which artifacts a run or a registered version of MLflow stands for; `research compare` calls it.

The last line of the output is a JSON list of hashes, the likeliest first. Exit codes: 0 done, 1 refused (the reason is the last line of
standard error), 3 MLflow failed or cannot be reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research_rl import config
from research_rl.config.redact import redact
from research_rl.errors import ConfigError, ResearchError
from research_rl.pipeline.stages import Workspace
from research_rl.terminal import say, say_json
from tasks.settings import sign_in
from tasks.tracking.registry import MANIFEST
from tasks.tracking.track import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["hashes", "main"]

_FAILED = 3
_UNKNOWN = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
_EVALUATIONS = ("evaluate", "baseline")


def hashes(client: MlflowClient, name: str) -> list[str]:
    """Return the hashes of the artifacts behind mlflow:RUN, registry:NAME/VERSION or registry:NAME@ALIAS.

    Raises ConfigError for a name of another form and for a run or version without a hash, MlflowException for an unknown one.
    """
    kind, _, rest = name.partition(":")
    digests = _of_run(client, rest) if kind == "mlflow" else _of_version(client, rest)
    if not digests:
        raise ConfigError(f"{name} names no artifact of this pipeline; name a run or a version that it reported")
    return digests


def _of_run(client: MlflowClient, run: str) -> list[str]:
    """Return the evaluations of a whole run, the later one first, or the artifact of a stage's run."""
    tags = client.get_run(run).data.tags
    # A policy's own run leads to the evaluation whose model it is.
    names = [*(f"manifest.{stage}" for stage in _EVALUATIONS), MANIFEST, "manifest.export"]
    return [tags[each] for each in names if each in tags]


def _of_version(client: MlflowClient, name: str) -> list[str]:
    model, at, alias = name.rpartition("@")
    if at:
        version = client.get_model_version_by_alias(model, alias)
    else:
        model, slash, number = name.rpartition("/")
        if not slash or not number.isdigit():
            raise ConfigError(f"registry:{name} names no version; write registry:NAME/VERSION or registry:NAME@ALIAS")
        version = client.get_model_version(model, number)
    return [version.tags[MANIFEST]] if MANIFEST in version.tags else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the hashes; return the exit code."""
    parser = argparse.ArgumentParser("tasks.tracking.lookup", description="Say which artifacts a name in MLflow stands for.")
    parser.add_argument("-w", "--workspace", type=Path, default=Path(), help="folder with params.yaml")
    parser.add_argument("name", help="mlflow:RUN, registry:NAME/VERSION or registry:NAME@ALIAS")
    options = parser.parse_args(arguments)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        root = options.workspace.resolve()
        uri = tracking_uri(config.load(root / "params.yaml"), Workspace(root))
        sign_in(uri)
        say_json(hashes(MlflowClient(tracking_uri=uri), options.name))
    except ResearchError as error:
        return _said(str(error), 1)
    except MlflowException as error:
        return _said(f"{options.name}: {error.message}", 1 if error.error_code in _UNKNOWN else _FAILED)
    return 0


def _said(text: str, code: int) -> int:
    say(redact(" ".join(text.split())), sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
