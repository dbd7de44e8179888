"""Stages that are killed, starved of space or built twice at once: nothing torn is accepted, and resuming gives the same artifact.

Each test runs `trials` in a process of its own; the long forms run the same in greater number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.trials import KNOWLEDGE

ROOT = Path(__file__).resolve().parents[2]
QUICK = [stage for stage in KNOWLEDGE if stage != "validate"]
"""Great Expectations takes seconds a build; its stage is in the long forms."""
LONG = {stage: 40 if stage == "validate" else 200 for stage in KNOWLEDGE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the knowledge side stands whole; the first trial builds it, as far as it needs it."""
    return tmp_path_factory.mktemp("faults") / "whole"


def trials(fault: str, whole: Path, root: Path, stage: str, number: int, seed: int = 1) -> dict[str, Any]:
    """Run trials in a fresh process with one thread, which may fork safely."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fault.trials", fault, str(whole), str(root), stage, str(number), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == []
    print(json.dumps({name: value for name, value in found.items() if name not in ("broken", "errors")}))
    return found


def killed(whole: Path, root: Path, stage: str, number: int) -> None:
    found = trials("kill", whole, root, stage, number)
    assert found["trials"] == number
    assert found["killed"] >= number // 2, "most trials must hit the build"
    assert found["accepted"] > 0 and found["missing"] > 0
    assert found["redone"] <= 1


@pytest.mark.parametrize("stage", QUICK)
def test_a_killed_stage_is_whole_or_absent_and_resumes(whole: Path, tmp_path: Path, stage: str) -> None:
    killed(whole, tmp_path, stage, 12)


@pytest.mark.long
@pytest.mark.parametrize("stage", KNOWLEDGE)
def test_a_thousand_kills(whole: Path, tmp_path: Path, stage: str) -> None:
    killed(whole, tmp_path, stage, LONG[stage])


def refreshed(whole: Path, root: Path, stage: str, number: int) -> None:
    """Kill the build of a stage in the middle of bringing it up to date."""
    found = trials("refresh", whole, root, stage, number)
    assert found["same"] and found["killed"] == found["trials"] == number
    # The first shard holds nothing that changed: its file is that of the artifact that was replaced.
    assert found["linked"] >= 1
    assert found["redone"] <= 1


@pytest.mark.parametrize("stage", ["embed", "index"])
def test_a_refresh_that_is_killed_is_whole_or_absent_and_resumes(tmp_path: Path, stage: str) -> None:
    refreshed(tmp_path / "whole", tmp_path, stage, 12)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["embed", "index"])
def test_a_thousand_kills_in_mid_refresh(tmp_path: Path, stage: str) -> None:
    refreshed(tmp_path / "whole", tmp_path, stage, 500)


def starved(found: dict[str, Any]) -> None:
    errors = [error for error in found["errors"] if error]
    assert errors, "no trial ran out of space"
    for kind, message in errors:
        assert kind == "StorageError", (kind, message)
        assert f"stage {found['stage']}" in message and "MB free" in message and "rerun" in message


@pytest.mark.parametrize("stage", ["download", "embed", "index"])
def test_a_file_size_limit_is_one_clear_error(whole: Path, tmp_path: Path, stage: str) -> None:
    starved(trials("starve", whole, tmp_path, stage, 2))


@pytest.mark.long
@pytest.mark.parametrize("stage", KNOWLEDGE)
def test_many_file_size_limits(whole: Path, tmp_path: Path, stage: str) -> None:
    starved(trials("starve", whole, tmp_path, stage, 4 if stage == "validate" else 20, 2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["corpus", "embed"])
def test_a_full_disk_is_one_clear_error_and_room_is_all_it_takes(whole: Path, small_disk: Path, stage: str) -> None:
    starved(trials("fill", whole, small_disk, stage, 2))


@pytest.mark.long
@pytest.mark.parametrize("stage", KNOWLEDGE)
def test_many_full_disks(whole: Path, small_disk: Path, stage: str) -> None:
    starved(trials("fill", whole, small_disk, stage, 4 if stage == "validate" else 20))


@pytest.mark.parametrize("stage", ["embed"])
def test_two_writers_agree(whole: Path, tmp_path: Path, stage: str) -> None:
    trials("pair", whole, tmp_path, stage, 4)


@pytest.mark.long
@pytest.mark.parametrize("stage", KNOWLEDGE)
def test_many_pairs_of_writers_agree(whole: Path, tmp_path: Path, stage: str) -> None:
    trials("pair", whole, tmp_path, stage, 4 if stage == "validate" else 30)
