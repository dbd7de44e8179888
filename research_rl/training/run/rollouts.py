"""Read the episodes that a run kept, one file a step. Knows files alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["read_lines", "read_rollouts", "rollout_files"]


def rollout_files(folder: Path, split: str = "") -> dict[int, Path]:
    """Return the files of rollouts of a train artifact by step, in order; with split "dev" those of the validations."""
    files = {int(path.name.partition(".")[0]): path for path in (folder / "rollouts" / split).glob("[0-9]*.jsonl*")}
    return dict(sorted(files.items()))


def read_rollouts(files: Mapping[int, Path]) -> Iterator[dict[str, Any]]:
    """Yield the rollouts of these files, each with its `step`."""
    for step, path in files.items():
        for row in read_lines(path):
            yield {**row, "step": step}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file of lines, gzipped or plain; nothing where there is no file."""
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            yield from (json.loads(line) for line in stream if line.strip())
