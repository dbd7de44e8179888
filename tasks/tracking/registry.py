"""Trained policies in MLflow's model registry: one version an artifact, named by its manifest's hash. Knows MLflow's client only.

Invariants: (1) every change of the champion is recorded with from, to, who, when and why, in a tag of the model and in tags of the
version; (2) a gate's promotion
moves nothing once another version is champion than the one that it met; (3) a rollback goes one version back in that record, and the
next one goes back further.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "BY_HAND",
    "CANDIDATE",
    "CHAMPION",
    "GATE",
    "MANIFEST",
    "ROLLBACK",
    "Move",
    "Reason",
    "before",
    "champion",
    "describe",
    "move",
    "moves",
    "promote",
    "register",
    "version_of",
]

CANDIDATE, CHAMPION = "candidate", "champion"
MANIFEST = "manifest"
GATE, BY_HAND, ROLLBACK = "gate", "hand", "rollback"
"""What moved the champion."""
_FOLDER = "model"
_MOVE, _OF_VERSION = "champion.move.", "champion."
_CHARS = 1000
logger = logging.getLogger("sender")


@dataclass(frozen=True)
class Reason:
    """What moved the champion (`GATE`, `BY_HAND` or `ROLLBACK`), who, why, and when (UTC)."""

    by: str
    who: str
    why: str
    when: str

    @classmethod
    def now(cls, by: str, who: str, why: str) -> Reason:
        """Return a reason that counts from this moment."""
        return cls(by, who, why, datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Move:
    """One change of the champion: numbers of the versions before (empty: none) and after it, and the reason."""

    before: str
    after: str
    reason: Reason


def champion(client: MlflowClient, model: str) -> Any:
    """Return the version that is champion, None when there is none, or no such model."""
    if not client.search_registered_models(f"name = '{model}'"):
        return None
    version = client.get_registered_model(model).aliases.get(CHAMPION)
    return client.get_model_version(model, str(version)) if version else None


def moves(client: MlflowClient, model: str) -> list[Move]:
    """Return the recorded changes of the champion, oldest first."""
    tags: dict[str, str] = client.get_registered_model(model).tags
    trees = [json.loads(tags[name]) for name in sorted(tags) if name.startswith(_MOVE)]
    return [Move(tree["before"], tree["after"], Reason(**tree["reason"])) for tree in trees]


def move(client: MlflowClient, model: str, to: str, reason: Reason) -> Move:
    """Make version `to` champion and record it, on the model and on the version."""
    stands = champion(client, model)
    made = Move(str(stands.version) if stands else "", to, reason)
    # The record first: a process that dies in between leaves a record of what it meant to do, never a change that nobody can explain.
    text = json.dumps({**asdict(made), "reason": {**asdict(reason), "why": reason.why[:_CHARS]}}, ensure_ascii=False)
    client.set_registered_model_tag(model, f"{_MOVE}{len(moves(client, model)) + 1:05}", text)
    about = {"before": made.before or "none", **asdict(reason), "why": reason.why[:_CHARS]}
    for name, value in about.items():
        client.set_model_version_tag(model, to, f"{_OF_VERSION}{name}", value)
    client.set_registered_model_alias(model, CHAMPION, to)
    return made


def before(recorded: Sequence[Move], stands: str) -> str | None:
    """Return the version that was champion before `stands`, None when the record names none.

    A version that was rolled back from does not come back by a further rollback.
    """
    line: list[str] = []
    for made in recorded:
        if made.reason.by == ROLLBACK and made.after in line:
            del line[_last(line, made.after) + 1 :]
            continue
        # An alias that was set in MLflow itself is in no record but that of the move after it.
        line += [version for version in (made.before, made.after) if version and line[-1:] != [version]]
    earlier = line[: _last(line, stands)] if stands in line else line
    return next((version for version in reversed(earlier) if version != stands), None)


def _last(line: Sequence[str], version: str) -> int:
    return max(place for place, other in enumerate(line) if other == version)


def promote(client: MlflowClient, model: str, manifest: str, met: str | None, reason: Reason) -> None:
    """Make the version of an artifact champion by a gate in which it met version `met`; another champion by then is left and logged."""
    version, stands = version_of(client, model, manifest), champion(client, model)
    number = str(stands.version) if stands else None
    if version is None:
        logger.warning("model %s has no version of artifact %s; it is not promoted", model, manifest[:12])
    elif number == str(version.version):
        return  # the event came twice
    elif number != met:
        text = f"version {number} is champion, but the gate met version {met}; hold the gate again"
        client.set_model_version_tag(model, version.version, "gate.overtaken", text)
        logger.warning("version %s of model %s is not promoted: %s", version.version, model, text)
    else:
        move(client, model, str(version.version), reason)


def register(client: MlflowClient, run: str, model: str, folder: Path, tags: Mapping[str, str]) -> None:
    """Upload `folder` into `run` and make it a version of `model` with these tags; an artifact that has one gets no second."""
    if not folder.is_dir():
        logger.warning("%s is gone; it is not registered", folder)
        return
    # The event may come twice: after a reply that was lost, or when an artifact is current again.
    version = version_of(client, model, tags[MANIFEST])
    if version is None:
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model, description="Policies trained to reason with search")
        client.log_artifacts(run, str(folder), _FOLDER)
        source = f"{client.get_run(run).info.artifact_uri}/{_FOLDER}"
        version = client.create_model_version(model, source, run_id=run, tags=dict(tags))
    client.set_registered_model_alias(model, CANDIDATE, version.version)


def describe(client: MlflowClient, model: str, manifest: str, text: str, tags: Mapping[str, str]) -> None:
    """Give the version of an artifact a description and tags, such as what it scored; one without a version is logged and passed over."""
    version = version_of(client, model, manifest)
    if version is None:
        logger.warning("model %s has no version of artifact %s; what it scored is not noted", model, manifest[:12])
        return
    client.update_model_version(model, version.version, description=text)
    for name, value in tags.items():
        client.set_model_version_tag(model, version.version, name, value)


def version_of(client: MlflowClient, model: str, manifest: str) -> Any:
    """Return the version whose artifact has this hash, None when there is none."""
    versions = client.search_model_versions(f"name = '{model}'")
    return next((version for version in versions if version.tags.get(MANIFEST) == manifest), None)
