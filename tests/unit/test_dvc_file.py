"""dvc.yaml is the stage table, and nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml

from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES
from research_rl.report.training import SERIES
from tasks.versioning import dvc_file


def test_the_committed_file_is_the_rendering() -> None:
    assert (CHECKOUT / "dvc.yaml").read_text(encoding="utf-8") == dvc_file.render(), "run `python -m tasks.versioning.dvc_file`"


def test_every_stage_but_the_snapshot_stands_with_its_parents_and_parameters() -> None:
    stages = yaml.safe_load(dvc_file.render())["stages"]
    assert list(stages) == [name for name in STAGES if name != "download"]
    for name, entry in stages.items():
        stage = STAGES[name]
        assert entry.get("deps", []) == [STAGES[parent].folder for parent in stage.parents]
        assert entry["outs"] == ([{stage.folder: {"persist": True}}] if name == "validate" else [stage.folder])
        assert set(entry.get("params", [])) == set(stage.keys)
        assert entry["cmd"].endswith(f"research_rl run {name}")


def test_no_output_lies_inside_another() -> None:
    folders = [Path(stage.folder) for stage in STAGES.values()]
    assert not [(a, b) for a in folders for b in folders if a != b and a in b.parents]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    assert dvc_file.write(tmp_path)
    assert not dvc_file.write(tmp_path)


def test_metrics_and_plots_lie_inside_the_artifacts_that_write_them() -> None:
    rendered = yaml.safe_load(dvc_file.render())
    files = [*rendered["metrics"], *(path for plot in rendered["plots"] for entry in plot.values() for path in entry["y"])]
    assert {Path(path).parent.as_posix() for path in files} == {STAGES["report"].folder}
    columns = {column for plot in rendered["plots"] for entry in plot.values() for names in entry["y"].values() for column in names}
    assert columns <= set(SERIES)
