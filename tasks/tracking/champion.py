"""`python -m tasks.tracking.champion show|fetch|promote|rollback`: the registry of trained policies by hand; `research` calls it.

The last line of the output is the answer as JSON. Exit codes: 0 done, 1 refused (the reason is the last line of standard error),
3 MLflow failed or cannot be reached.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_rl.config.redact import redact
from research_rl.errors import ConfigError, ManifestError, ResearchError, ServiceError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.terminal import say, say_json
from tasks.settings import sign_in
from tasks.sqlite import sqlite_uri
from tasks.tracking import registry
from tasks.tracking.announce import announce
from tasks.tracking.registry import BY_HAND, CHAMPION, ROLLBACK, Move, Reason
from tasks.tracking.sender import CLIENT, RefusedEvent, Unreachable, reaching
from tasks.tracking.track import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from research_rl.config import Config

__all__ = ["Desk", "local", "main", "whoami"]

_FAILED = 3
_STAGES = ("export", "policy")


def whoami() -> str:
    """Return who moves a champion by hand: user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def local(workspace: Workspace, hash: str) -> Path | None:
    """Return the folder of the workspace that holds the model of a version, by its manifest's hash; None when none does."""
    for folder in (*(workspace.folder(stage) for stage in _STAGES), workspace.work("registry") / hash):
        if hash and (artifact := manifest.found(folder, verify=False)) and artifact.hash == hash:
            return folder
    return None


@dataclass
class Desk:
    """One registered model and its registry, as the actions of the command line see them."""

    client: MlflowClient
    workspace: Workspace
    model: str

    def show(self) -> dict[str, Any]:
        """Return the number of the version that is champion, None when there is none."""
        stands = registry.champion(self.client, self.model)
        number = str(stands.version) if stands else None
        return {"champion": number, "said": f"champion of {self.model}: {f'version {number}' if number else 'none'}"}

    def fetch(self, version: str) -> dict[str, Any]:
        """Return number and folder of a version, its model downloaded unless it is here. Raises ConfigError and ServiceError."""
        entry = self._version(version)
        hash = entry.tags.get(registry.MANIFEST, "")
        folder = local(self.workspace, hash) or self._downloaded(entry, hash)
        return {"folder": str(folder), "version": version, "said": f"version {version} of {self.model} is in {folder}"}

    def promote(self, to: str, why: str) -> dict[str, Any]:
        """Make version `to` champion. Raises ConfigError when it is so already, or is not there."""
        self._version(to)
        if self.show()["champion"] == to:
            raise ConfigError(f"version {to} of {self.model} is the champion already; name another")
        return self._moved(registry.move(self.client, self.model, to, Reason.now(BY_HAND, whoami(), why)))

    def rollback(self, why: str) -> dict[str, Any]:
        """Make the version champion that was it before. Raises ConfigError when the record names none."""
        stands = self.show()["champion"]
        if stands is None:
            raise ConfigError(f"{self.model} has no champion, so there is nothing to roll back; `research promote --to VERSION` makes one")
        to = registry.before(registry.moves(self.client, self.model), stands)
        if to is None:
            raise ConfigError(
                f"no version of {self.model} was champion before version {stands}, as far as is recorded; `research promote --to VERSION` "
                "makes any version champion"
            )
        self._version(to)
        reason = Reason.now(ROLLBACK, whoami(), why or f"rollback of version {stands}")
        return self._moved(registry.move(self.client, self.model, to, reason))

    def _moved(self, made: Move) -> dict[str, Any]:
        announce(self.model, made)
        before = f"version {made.before}" if made.before else "none"
        return {"from": made.before, "to": made.after, "said": f"champion of {self.model}: version {made.after}, before {before}"}

    def _version(self, number: str) -> Any:
        versions = {str(version.version): version for version in self.client.search_model_versions(f"name = '{self.model}'")}
        if number not in versions:
            known = ", ".join(sorted(versions, key=int)) or "none"
            raise ConfigError(f"{self.model} has no version {number}; its versions are {known}")
        return versions[number]

    def aliased(self, alias: str) -> str:
        """Return the number of the version that an alias names. Raises ConfigError naming the aliases that exist."""
        models = self.client.search_registered_models(f"name = '{self.model}'")
        aliases = self.client.get_registered_model(self.model).aliases if models else {}
        if alias not in aliases:
            known = ", ".join(f"{name} (version {version})" for name, version in sorted(aliases.items())) or "none"
            raise ConfigError(f"{self.model} has no alias {alias!r}; its aliases are {known}")
        return str(aliases[alias])

    def _downloaded(self, version: Any, hash: str) -> Path:
        """Download a version beside the unfinished work, and publish it there in one rename. Raises ServiceError for a torn one."""
        from mlflow.artifacts import download_artifacts

        target = self.workspace.work("registry") / (hash or f"{self.model}-{version.version}".replace(" ", "_"))
        if target.is_dir() and not hash:
            return target
        staging = target.with_name(f".{target.name}.tmp")
        for stale in (staging, target):
            shutil.rmtree(stale, ignore_errors=True)
        staging.mkdir(parents=True)
        got = Path(download_artifacts(artifact_uri=version.source, dst_path=str(staging), tracking_uri=self.client.tracking_uri))
        if hash:
            try:
                actual = manifest.load(got).hash
            except ManifestError as error:
                raise ServiceError(f"version {version.version} of {self.model} did not come whole: {error}") from None
            if actual != hash:
                raise ServiceError(f"version {version.version} of {self.model} holds artifact {actual[:12]}, its tag says {hash[:12]}")
        got.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
        return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one action; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        answer = reaching(lambda: _act(options))
    except (RefusedEvent, Unreachable) as error:
        say(redact(f"{error}; set MLFLOW_TRACKING_URI or tracking.mlflow_uri to a server that answers"), sys.stderr)
        return _FAILED
    except ServiceError as error:
        say(redact(str(error)), sys.stderr)
        return _FAILED
    except ResearchError as error:
        say(redact(str(error)), sys.stderr)
        return 1
    say_json(answer)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tasks.tracking.champion", description="See and move the champion of the model registry.")
    parser.add_argument("-w", "--workspace", type=Path, default=Path(), help="folder with params.yaml")
    parser.add_argument("-p", "--profile", help="profile instead of the workspace's params.yaml")
    parser.add_argument("--override", action="append", default=[], metavar="section.key=value", help="a parameter for this call")
    actions = parser.add_subparsers(required=True, dest="action")
    actions.add_parser("show", help="which version is champion").add_argument("model", nargs="?")
    actions.add_parser("fetch", help="the folder of a version").add_argument("name", help="NAME@ALIAS or NAME/VERSION")
    promote = actions.add_parser("promote", help="make a version champion")
    promote.add_argument("--to", required=True)
    promote.add_argument("--why", required=True)
    actions.add_parser("rollback", help="make the version before champion").add_argument("--why", default="")
    return parser


def _act(options: argparse.Namespace) -> dict[str, Any]:
    from research_rl import config

    root = options.workspace.resolve()
    resolved = (
        config.load_profile(options.profile, options.override) if options.profile else config.load(root / "params.yaml", options.override)
    )
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "show": lambda: _show(resolved, root, options.model),
        "fetch": lambda: _fetch(resolved, root, options.name),
        "promote": lambda: _desk(resolved, root).promote(options.to, options.why),
        "rollback": lambda: _desk(resolved, root).rollback(options.why),
    }
    return actions[options.action]()


def _show(config: Config, root: Path, model: str | None) -> dict[str, Any]:
    # Where nothing was ever tracked nobody is champion; MLflow would make a database first, which takes long.
    if tracking_uri(config, Workspace(root)) == sqlite_uri(root / "mlflow.db") and not (root / "mlflow.db").is_file():
        return {"champion": None, "said": "nothing is registered yet"}
    return _desk(config, root, model).show()


def _fetch(config: Config, root: Path, name: str) -> dict[str, Any]:
    model, at, alias = name.rpartition("@")
    if at and model:
        desk = _desk(config, root, model)
        return desk.fetch(desk.aliased(alias))
    model, slash, version = name.rpartition("/")
    if not slash or not version.isdigit():
        raise ConfigError(f"registry:{name} names no version; write registry:NAME@ALIAS, such as @{CHAMPION}, or registry:NAME/VERSION")
    return _desk(config, root, model).fetch(version)


def _desk(config: Config, root: Path, model: str | None = None) -> Desk:
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    if not (chosen := model or config.tracking.registered_model):
        raise ConfigError("tracking.registered_model is empty, so nothing is registered; set it to the name of the policies")
    workspace = Workspace(root)
    uri = tracking_uri(config, workspace)
    sign_in(uri)
    # What is downloaded is looked for there too.
    mlflow.set_tracking_uri(uri)
    return Desk(mlflow.MlflowClient(tracking_uri=uri), workspace, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
