"""Builds a small knowledge side for tests, stage by stage, with the stages' own functions."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from research_rl.config import Config
from research_rl.corpus import build as corpus
from research_rl.embedding import build as embed
from research_rl.index import build as index
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Progress, Workspace, silent
from tests.waiting import until

TOWNS = ("Avonlea", "Brockhurst", "Caldera", "Dunmore", "Eastwick")


def passages(rows: int) -> list[dict[str, str]]:
    """Return `rows` passages, each with words of its own."""
    return [
        {"id": f"p{n}", "contents": f'"Person{n}"\nPerson{n} Surname{n} lives in {TOWNS[n % 5]} since {1000 + n}.'} for n in range(rows)
    ]


def context(stage: str, root: Path, progress: Progress = silent, **tree: Any) -> Context:
    """Return the context of a stage whose parents stand."""
    workspace = Workspace(root)
    parents = {name: manifest.load(workspace.folder(name)) for name in STAGES[stage].parents}
    return Context(STAGES[stage], Config.model_validate(tree), workspace, parents, progress)


def store(root: Path, rows: int = 250, **tree: Any) -> Workspace:
    """Build download, validate and corpus."""
    return snapshot(root, passages(rows), **tree)


def snapshot(root: Path, rows: Sequence[dict[str, str]], **tree: Any) -> Workspace:
    """Build download, validate and corpus of these passages, over what stands."""
    workspace = checked(root, rows)
    corpus.run(context("corpus", root, corpus={"shard_rows": 100}, **tree))
    return workspace


def checked(root: Path, rows: Sequence[dict[str, str]]) -> Workspace:
    """Build download and validate of these passages, over what stands."""
    workspace = Workspace(root)
    with manifest.publish(workspace.folder("download"), "download", "x", {}) as staging:
        staging.counts["corpus"] = len(rows)
        (staging.path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with manifest.publish(workspace.folder("validate"), "validate", "x", {"download": manifest.load(workspace.folder("download"))}):
        pass
    return workspace


def built(root: Path, rows: int = 250, **tree: Any) -> Workspace:
    """Build everything up to the index."""
    workspace = store(root, rows)
    embed.run(context("embed", root, **tree))
    index.run(context("index", root, **tree))
    return workspace


def until_ready(process: subprocess.Popen[bytes] | psutil.Popen, url: str) -> None:
    """Wait until a retriever answers; fail when it ends."""

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    assert until(ready, over=lambda: process.poll() is not None), f"{url} is not ready (exit code {process.poll()})"
