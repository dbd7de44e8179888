"""The command line answers fast, names what is wrong, and leaves nothing half-written."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from research_rl import config
from research_rl.cli import main
from research_rl.pipeline import manifest
from research_rl.pipeline.run import standing
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.planning import knowledge


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    assert main(["init", "-w", str(tmp_path)]) == 0
    return tmp_path


def processor_seconds(*arguments: str) -> float:
    """Processor time of Python with these arguments, the least of three runs, so that a cold disk does not count."""
    times: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_takes_less_than_300_ms_of_processor_time() -> None:
    """On a machine where Python itself takes long, less than six times as long as Python with what any command line needs."""
    bare = processor_seconds("-c", "import argparse, pathlib, signal")
    assert processor_seconds("-m", "research_rl", "--help") < max(0.3, 6 * bare)


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
    assert main(["run", "download", "-w", str(workspace), "seed=7"]) == 0
    assert "download: built" in capsys.readouterr().out
    assert main(["status", "-w", str(workspace)]) == 0
    assert re.search(r"^download +current .* built 20\d\d-\d\d-\d\d \d\d:\d\d UTC in \d+\.\d s$", capsys.readouterr().out, re.MULTILINE)
    assert main(["status", "-w", str(workspace), "seed=8"]) == 0
    assert "data.seed 7 -> 8" in capsys.readouterr().out


def test_what_builds_writes_its_parameters_first_and_names_each_change(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.generated.entities=120", "data.generated.train_questions=16", "data.generated.test_questions=8"]
    assert main(["run", "download", "-w", str(workspace), "train.steps=40", "train={lr: 0.5}", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"train.steps 24 -> 40, written to params.yaml", "train.lr 0.0001 -> 0.5, written to params.yaml"} < set(lines)
    assert config.load(workspace / "params.yaml").train.steps == 40


def test_a_run_that_builds_nothing_and_fails_leaves_params_yaml_as_it_was(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (workspace / "params.yaml").read_bytes()
    assert main(["run", "prepare", "-w", str(workspace), "train.steps=40"]) == 1  # nothing is downloaded yet
    assert capsys.readouterr().out.splitlines()[-1] == "params.yaml put back as it was: nothing was built"
    assert (workspace / "params.yaml").read_bytes() == before


def stands(space: Workspace, resolved: config.Config, *stages: str) -> None:
    """Publish empty artifacts of some stages under a configuration."""
    for name in stages:
        with manifest.publish(space.folder(name), name, config.config_hash(resolved, STAGES[name].sections), {}):
            pass


@pytest.mark.parametrize("stage", ["baseline", "index", "report"])
def test_a_stage_takes_no_parameter_that_another_one_was_built_with(
    stage: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`research run baseline train.lr=...` wrote it to params.yaml: a finished training counted as stale by what it was not given."""
    before = (workspace / "params.yaml").read_bytes()
    stands(Workspace(workspace), config.load(workspace / "params.yaml"), "train")
    capsys.readouterr()
    assert main(["run", stage, "-w", str(workspace), "train.lr=0.5"]) == 1
    told = capsys.readouterr()
    assert f"train.lr 0.0001 -> 0.5: the stage {stage} does not read it, and train, built with the former value, would be stale" in told.err
    assert "give it to `research run train`" in told.err and not told.out
    assert (workspace / "params.yaml").read_bytes() == before


def test_a_parameter_that_the_stage_reads_is_taken_though_others_read_it_too(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stands(Workspace(workspace), config.load(workspace / "params.yaml"), "train", "policy")
    small = ["data.generated.entities=120", "data.generated.train_questions=16", "data.generated.test_questions=8"]
    assert main(["run", "download", "-w", str(workspace), "seed=7", "train.lr=0.0001", *small]) == 0
    assert "seed 42 -> 7, written to params.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["plan"], ["status"], ["config", "show"]])
def test_what_only_looks_writes_nothing(workspace: Path, verb: list[str]) -> None:
    before = (workspace / "params.yaml").read_bytes()
    assert main([*verb, "-w", str(workspace), "train.steps=40"]) == 0
    assert (workspace / "params.yaml").read_bytes() == before


def test_a_plan_reckons_with_the_profile_that_is_named_not_with_what_lies_there(workspace: Path) -> None:
    assert main(["run", "download", "-w", str(workspace), "data.generated.entities=120"]) == 0
    space, own = Workspace(workspace), config.load(workspace / "params.yaml")
    assert knowledge.passages(own, space) == standing("download", own, space).counts["corpus"]  # type: ignore[union-attr]
    assert knowledge.passages(config.load_profile("paper-7b"), space) == 21_015_324
    assert knowledge.passages(config.load_profile("laptop"), space) is None, "another size of the same profile"


def test_init_says_what_a_profile_still_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "-w", str(tmp_path), "-p", "smollm"]) == 0
    assert "data.folder is still needed" in capsys.readouterr().out


def test_describe_lists_every_parameter_with_type_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  train.steps = 24 (int, >= 1): ") for line in lines)
    assert any(line.startswith("  episode.wall_s = 120.0 (float, > 0, seconds): ") for line in lines)
    assert any(line.startswith("  reward.terms[].weight (float): ") for line in lines)
    assert any(line.startswith("  watch.nan.limit = 0.0 (float): ") for line in lines), "the rule's default, which its class does not have"
    assert any(line.startswith('  watch.suspect.action = "warn" (ignore | warn | stop): ') for line in lines)
    assert any(line.startswith("  retriever.max_body_mib = 32 (int, >= 1, MiB): ") for line in lines)
    assert any(line.startswith("  agent.max_body_kib = ") and ", KiB): " in line for line in lines)
    # A heading says a thing once; where several sections are of one class, each says what it is itself.
    assert "corpus: The passage store." in lines
    assert [line for line in lines if line.startswith("policy.warmup_world: ") and "source" in line] == []
    assert "watch.nan: Metrics of the update that are NaN or infinite." in lines


def test_stage_table_is_a_chain_without_cycles_over_known_sections(tmp_path: Path) -> None:
    seen: set[str] = set()
    for stage in STAGES.values():
        assert set(stage.parents) <= seen
        assert set(config.parameters(config.load_profile("laptop"), stage.sections)) == set(stage.sections)
        seen.add(stage.name)
    folders = [Workspace(tmp_path).folder(name) for name in STAGES]
    assert len(set(folders)) == len(folders)


def test_a_terminal_that_lacks_a_character_gets_it_as_an_escape(tmp_path: Path) -> None:
    place = tmp_path / "Ada-\u00e9"
    research, ascii_only = [sys.executable, "-m", "research_rl"], {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert main(["init", "-w", str(place)]) == 0
    done = subprocess.run([*research, "plan", "-w", str(place)], capture_output=True, env=ascii_only, check=False)
    assert b"Ada-\\xe9" in done.stdout and b"Traceback" not in done.stderr


@contextmanager
def read_only(folder: Path) -> Generator[None]:
    """Take all rights to write in a folder from this process, also where root runs it: nothing is closed to root."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    user = os.geteuid()
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_in_a_workspace_that_may_only_be_read_what_looks_works_and_what_builds_says_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        small = ["data.generated.entities=120", "data.generated.train_questions=16", "data.generated.test_questions=8"]
        assert main(["init", "-w", name, *small]) == 0 and main(["run", "download", "-w", name]) == 0
        # What a verb imports lies in folders that may be closed to other users, too.
        assert [main([*verb, "-w", name]) for verb in (["status"], ["plan"], ["config", "show"], ["run", "download"])] == [0] * 4
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for lock in (True, False):
            # A workspace that was copied has no lock file: then it is the folder that cannot be written.
            if not lock:
                [path.unlink() for path in folder.rglob("*.lock")]
                before = {path: content for path, content in before.items() if path.is_file()}
            for verb, code in (["status"], 0), (["plan"], 0), (["config", "show"], 0), (["run", "download"], 1), (["init", "seed=3"], 1):
                capsys.readouterr()
                with read_only(folder):
                    assert main([*verb, "-w", name]) == code, verb
                told = capsys.readouterr()
                assert told.err.count("\n") == code and ("write" in told.err) == bool(code), told.err
                assert verb != ["status"] or re.search("^download +current", told.out, re.MULTILINE)
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
