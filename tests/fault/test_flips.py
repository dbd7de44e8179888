"""One bit of one file of an artifact flipped, for every kind of file there is: no reader accepts it."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from research_rl.config import Config
from research_rl.errors import ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current, run_stage
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from research_rl.planning.plan import state
from research_rl.report.build import run as report
from research_rl.retriever.retriever import Retriever
from tests.fault.trials import CONFIG, KNOWLEDGE
from tests.unit.test_report import evaluation, result, training


def with_factory(factory: str) -> Config:
    return CONFIG.model_copy(update={"index": CONFIG.index.model_copy(update={"factory": factory})})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with every stage of the knowledge side, and training, evaluations and a report beside it."""
    workspace = Workspace(tmp_path_factory.mktemp("flips") / "whole")
    for stage in KNOWLEDGE:
        run_stage(stage, with_factory("Exact"), workspace)
    parents = {"train": training(workspace.folder("train"), 3)}
    for stage in ("baseline", "evaluate"):
        parents[stage] = evaluation(workspace.folder(stage), [result(row, "Ada") for row in range(4)])
    report(Context(STAGES["report"], with_factory("Exact"), workspace, parents, silent))
    return workspace


@pytest.fixture(scope="module", params=["Exact", "Flat"])
def built(request: pytest.FixtureRequest, whole: Workspace) -> tuple[Config, Workspace]:
    """The same with either kind of index."""
    config, workspace = with_factory(request.param), Workspace(whole.root.parent / request.param)
    shutil.copytree(whole.root, workspace.root)
    run_stage("index", config, workspace)
    return config, workspace


def kinds(workspace: Workspace) -> dict[tuple[str, str], list[Path]]:
    """Return the files of all artifacts by stage and name, numbers in names aside."""
    found: dict[tuple[str, str], list[Path]] = {}
    for stage in STAGES:
        folder = workspace.folder(stage)
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
            found.setdefault((stage, re.sub(r"\d+", "#", path.relative_to(folder).as_posix())), []).append(path)
    return found


def flip(path: Path, draw: random.Random) -> bytes:
    """Flip one bit and return the bytes as they were."""
    whole = path.read_bytes()
    # A header decides more than the rest of a file, so every other flip goes there.
    place = draw.randrange(min(128, len(whole)) if draw.random() < 0.5 else len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
    return whole


def undetected(stage: str, config: Config, workspace: Workspace) -> list[str]:
    """Return the readers that accept a damaged stage."""
    found: list[str] = []
    if stage in KNOWLEDGE and current(stage, config, workspace):
        found.append("current")
    if next(row for row in state(config, workspace) if row.stage == stage).state != "torn":
        found.append("research status")
    try:
        manifest.load(workspace.folder(stage))
        found.append("load")
    except ManifestError:
        pass
    if stage in ("corpus", "index") or (stage == "embed" and config.index.factory == "Exact"):
        try:
            Retriever.open(workspace, config.retriever)
            found.append("Retriever.open")
        except ManifestError:
            pass
    return found


def flipped(built: tuple[Config, Workspace], each: int, seed: int) -> int:
    config, workspace = built
    draw, missed, done = random.Random(seed), list[str](), 0
    for (stage, kind), paths in kinds(workspace).items():
        for _ in range(each):
            path = draw.choice(paths)
            whole = flip(path, draw)
            missed += [f"{stage} {kind}: {reader}" for reader in undetected(stage, config, workspace)]
            path.write_bytes(whole)
            done += 1
    assert missed == []
    assert all(current(stage, config, workspace) for stage in KNOWLEDGE), "the flips were taken back"
    return done


def test_a_flipped_bit_is_seen_in_every_kind_of_file(built: tuple[Config, Workspace]) -> None:
    assert {stage for stage, _ in kinds(built[1])} >= {*KNOWLEDGE, "train", "baseline", "report"}
    assert flipped(built, 1, 1) > 25


@pytest.mark.long
def test_hundreds_of_flipped_bits(built: tuple[Config, Workspace]) -> None:
    print(flipped(built, 12, 2), "flips in", len(kinds(built[1])), "kinds of files, all seen")
