"""Trained policies in MLflow's model registry: one version an artifact, named by its manifest's hash. Knows MLflow's client only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CANDIDATE", "CHAMPION", "MANIFEST", "describe", "point", "register", "version_of"]

CANDIDATE, CHAMPION = "candidate", "champion"
MANIFEST = "manifest"
_FOLDER = "model"
logger = logging.getLogger("sender")


def register(client: MlflowClient, run: str, model: str, folder: Path, tags: Mapping[str, str]) -> None:
    """Upload `folder` into `run` and make it a version of `model` with these tags; an artifact that has one gets no second."""
    if not folder.is_dir():
        logger.warning("%s is gone; it is not registered", folder)
        return
    # The event may come twice: after a reply that was lost, or when an artifact is current again.
    if version_of(client, model, tags[MANIFEST]) is None:
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model, description="Policies trained to reason with search")
        client.log_artifacts(run, str(folder), _FOLDER)
        source = f"{client.get_run(run).info.artifact_uri}/{_FOLDER}"
        client.create_model_version(model, source, run_id=run, tags=dict(tags))
    point(client, model, tags[MANIFEST], CANDIDATE)


def point(client: MlflowClient, model: str, manifest: str, alias: str) -> None:
    """Let `alias` name the version of an artifact; an artifact without a version is logged and passed over."""
    version = version_of(client, model, manifest)
    if version is None:
        logger.warning("model %s has no version of artifact %s; alias %s is not set", model, manifest[:12], alias)
        return
    client.set_registered_model_alias(model, alias, version.version)


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
