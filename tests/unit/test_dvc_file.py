"""dvc.yaml is the stage table, and nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml

from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES
from tasks.versioning import dvc_file


def test_the_committed_file_is_the_rendering() -> None:
    assert (CHECKOUT / "dvc.yaml").read_text(encoding="utf-8") == dvc_file.render(), "run `python -m tasks.versioning.dvc_file`"


def test_every_stage_but_the_snapshot_stands_with_its_parents_and_parameters() -> None:
    stages = yaml.safe_load(dvc_file.render())["stages"]
    assert list(stages) == [name for name in STAGES if name != "download"]
    for name, found in stages.items():
        stage = STAGES[name]
        assert found.get("deps", []) == [STAGES[parent].folder for parent in stage.parents]
        assert found["outs"] == ([{stage.folder: {"persist": True}}] if name == "validate" else [stage.folder])
        assert set(found.get("params", [])) == set(stage.keys)
        assert found["cmd"].endswith(f"research_rl run {name}")


def test_no_output_lies_inside_another() -> None:
    folders = [Path(stage.folder) for stage in STAGES.values()]
    assert not [(a, b) for a in folders for b in folders if a != b and a in b.parents]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    assert dvc_file.write(tmp_path)
    assert not dvc_file.write(tmp_path)
