"""The command line answers fast, names what is wrong, and leaves nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from research_rl import config
from research_rl.cli import main
from research_rl.pipeline.stages import STAGES, Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    assert main(["init", "-w", str(tmp_path)]) == 0
    return tmp_path


def test_help_comes_in_under_300_ms() -> None:
    times: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "research_rl", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_the_package_imports_no_orchestration_and_nothing_heavy() -> None:
    code = "import sys, research_rl.cli, research_rl.episode.agent, research_rl.pipeline.stages; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"prefect", "mlflow", "dvc", "great_expectations", "torch", "faiss", "transformers", "verl"} & set(loaded)


def test_init_writes_the_profile_once(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.load(workspace / "params.yaml") == config.load_profile("laptop")
    assert main(["init", "-w", str(workspace)]) == 0
    assert "unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "prepare", "trian.steps=2"], "trian is unknown; did you mean 'train'?"),
        (["run", "prepair"], "stage='prepair' is not one of"),
        (["run", "index"], "is missing, torn or built from other parameters; run `research run corpus` first"),
        (["status", "-p", "huge"], "profile='huge' is not one of"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([arguments[0], "-w", str(workspace), *arguments[1:]]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert sorted(path.name for path in workspace.iterdir()) in (["params.yaml"], ["artifacts", "params.yaml"])


@pytest.mark.parametrize(
    ("arguments", "named"), [([], ["serve-retriever", "init", "plan"]), (["run"], ["required: {download,", *STAGES, "all}"])]
)
def test_an_incomplete_command_says_what_may_follow(capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    printed = capsys.readouterr().err
    assert all(name in printed for name in named)
    assert "required" not in printed or "section.key=value" not in printed.partition("required")[2]


def test_help_of_run_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    assert f"{{{','.join(STAGES)},all}}" in capsys.readouterr().out


def test_download_is_skipped_when_nothing_changed_and_redone_when_a_parameter_did(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.generated.entities=120", "data.generated.train_questions=16", "data.generated.test_questions=8"]
    for expected in ("download: built", "download: current, skipped"):
        assert main(["run", "download", "-w", str(workspace), *small]) == 0
        assert expected in capsys.readouterr().out
    assert main(["run", "download", "-w", str(workspace), *small, "seed=7"]) == 0
    assert "download: built" in capsys.readouterr().out
    assert main(["status", "-w", str(workspace), *small]) == 0
    assert "download   stale    " in capsys.readouterr().out


def test_describe_lists_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "describe"]) == 0
    assert "  train.steps = " in capsys.readouterr().out


def test_stage_table_is_a_chain_without_cycles_over_known_sections(tmp_path: Path) -> None:
    seen: set[str] = set()
    for stage in STAGES.values():
        assert set(stage.parents) <= seen
        assert set(stage.sections) <= set(config.Config.model_fields)
        seen.add(stage.name)
    folders = [Workspace(tmp_path).folder(name) for name in STAGES]
    assert len(set(folders)) == len(folders)
