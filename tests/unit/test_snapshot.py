"""The tracked data.dvc names the snapshot that the laptop profile generates, so that a fresh clone's demo changes no tracked file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Workspace


def test_data_dvc_holds_the_hash_of_the_laptop_profiles_data(tmp_path: Path) -> None:
    """Mend it by running `make demo` in a fresh clone and committing its data.dvc. The hash is DVC's for a folder."""
    run_stage("download", config.load_profile("laptop"), Workspace(tmp_path))
    files = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    rows = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(tmp_path / "data").as_posix()} for path in files
    ]
    (tracked,) = yaml.safe_load((CHECKOUT / "data.dvc").read_text())["outs"]
    assert tracked["md5"] == f"{hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest()}.dir"
    assert tracked["nfiles"] == len(files) and tracked["size"] == sum(path.stat().st_size for path in files)
