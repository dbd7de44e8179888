"""A night: the policy in service, measured on the present questions and index, against the last night that was accepted.

Invariants: (1) a night whose model, set, index and protocol were measured before is not measured again; (2) a night with a regression
is accepted only by hand, so that a fall in small steps is compared with what stood before all of them; (3) so is one that cannot be
compared with every set of the accepted night: that nothing was seen to fall is then no news; (4) of nights on which nothing changed, at
most 5 % show a fall, however many sets there are.

The test of a difference is Fisher's randomisation test of pairs (1935), corrected for the sets by Holm's method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from research_rl.config import Config
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation import cells
from research_rl.evaluation.answers import Asking, answers
from research_rl.evaluation.cells import Model
from research_rl.evaluation.comparison import Comparison, PairedMetric, compare_sets, holm
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.intervals import FEWEST
from research_rl.evaluation.results import RECORD, Result, read_questions, read_results
from research_rl.evaluation.summary import BETTER_HIGH, METRICS
from research_rl.pipeline import json_lines, manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Progress, Workspace

__all__ = ["STAGE", "Drift", "Night", "accept", "accepted", "measure"]

STAGE = "night"
_FOLDER = Path("artifacts") / "nights"
_ACCEPTED = "accepted.jsonl"
_SHOWN = 12
_ALPHA = 0.05
_FLIPS = 9_999
"""Random signs of all pairs' differences that the test compares with what was seen."""
_BLOCK = 4_000_000
"""Numbers that it holds at once."""


@dataclass(frozen=True)
class Drift:
    """How a question set's mean moved since the accepted night: paired difference, its 95 % interval, and whether it is a fall.

    `p` is how often chance alone moves a mean as far, corrected for the sets that are compared; 1 where there are too few pairs.
    """

    question_set: str
    before: float
    after: float
    mean: float
    low: float
    high: float
    n: int
    p: float
    regressed: bool


@dataclass(frozen=True)
class Night:
    """A measured night: its artifact, whether it was measured now, the folder's name of the night it is compared with, and the drifts.

    `unknown` names the sets of the accepted night of which too few questions were answered in both, for whatever reason.
    """

    folder: Path
    manifest: Manifest
    fresh: bool
    against: str | None
    drifts: tuple[Drift, ...]
    unknown: tuple[str, ...] = ()

    @property
    def regressed(self) -> list[str]:
        """The question sets that fell."""
        return [drift.question_set for drift in self.drifts if drift.regressed]

    @property
    def verdict(self) -> str:
        """What became of it, in a few words."""
        fell = f"fell on {', '.join(self.regressed)}" if self.regressed else "no fall"
        return f"{fell}; not comparable on {', '.join(self.unknown)}" if self.unknown else fell


def measure(config: Config, workspace: Workspace, model: Model, progress: Progress) -> Night:
    """Measure a model unless an equal night stands, compare it with the accepted night, and accept it when each set was seen not to fall.

    Raises ConfigError, DataError, ManifestError, ModelError and ServiceError.
    """
    if config.gate.metric not in BETTER_HIGH:
        raise ConfigError(f"gate.metric={config.gate.metric!r} has no better direction; choose one of {sorted(BETTER_HIGH)}")
    built = cells.parents(workspace, config)
    questions = read_questions(workspace.folder("prepare") / "test.parquet", config.evaluation.rows, config.evaluation.rows_per_set)
    side = answers(config, workspace, built, model, sorted({question.data_source for question in questions}))
    hash = hashlib.sha256("\n".join(cell.hash for cell in side.cells).encode()).hexdigest()
    folder = workspace.root / _FOLDER / f"{model.label}-{hash[:_SHOWN]}"
    fresh = manifest.found(folder) is None
    if fresh:
        with Asking(config, workspace, questions, progress) as asking:
            asking.ask(side, questions)
        facts = {"model": model.name, "model_sha256": model.sha256}
        with manifest.publish(folder, STAGE, hash, built, facts) as staging:
            whole = model.config(config, workspace)
            recorded = {**cells.recorded(whole), "night": facts}
            write_evaluation(staging, whole, [side.results[question.row] for question in questions], recorded)
    night = _compared(config, workspace, folder, fresh)
    if fresh and not night.regressed and not night.unknown:
        accept(workspace, night)
    return night


def accepted(workspace: Workspace) -> Path | None:
    """Return the folder of the night that was accepted last and is whole, None before the first."""
    lines = [record for _, record in json_lines.read(workspace.root / _FOLDER / _ACCEPTED)]
    folders = [workspace.root / _FOLDER / str(line["night"]) for line in lines]
    return next((folder for folder in reversed(folders) if manifest.found(folder)), None)


def accept(workspace: Workspace, night: Night) -> None:
    """Let later nights be compared with this one."""
    if night.folder != accepted(workspace):
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"night": night.folder.name, "manifest": night.manifest.hash, "when": when, "regressed": night.regressed}
        json_lines.append(workspace.root / _FOLDER / _ACCEPTED, record, sync=True)


def _compared(config: Config, workspace: Workspace, folder: Path, fresh: bool) -> Night:
    reference, artifact = accepted(workspace), manifest.load(folder, verify=False)
    if reference is None or reference == folder:
        return Night(folder, artifact, fresh, None, ())
    compared = compare_sets(_results(reference), read_results(folder), config.evaluation.bootstrap, config.evaluation.seed)
    drifts = _drifts(compared, config.gate.metric, config.evaluation.seed)
    # As the file says, not the results: those of another version cannot be read.
    sets = json.loads((reference / "metrics.json").read_text(encoding="utf-8"))["by_data_source"]
    known = {drift.question_set for drift in drifts if drift.n >= FEWEST}
    return Night(folder, artifact, fresh, reference.name, drifts, tuple(sorted(set(sets) - known)))


def _results(reference: Path) -> list[Result]:
    """Return the results of the accepted night; none where another version recorded or graded them."""
    if manifest.load(reference, verify=False).facts.get("record", RECORD) != RECORD:
        return []
    try:
        return read_results(reference)
    except DataError:  # of a version before evaluations were marked by the one that graded them
        return []


def _drifts(compared: Mapping[str, Comparison], metric: str, seed: int) -> tuple[Drift, ...]:
    by_set = {name: each for name, comparison in compared.items() for each in comparison.metrics if each.name == metric}
    # Only sets with pairs enough: the others decide nothing and would make Holm's correction stricter for all.
    chances = {name: _chance(compared[name], metric, seed) for name, each in by_set.items() if each.difference.decides}
    corrected = holm(chances)
    return tuple(_drift(name, each, corrected.get(name, 1.0)) for name, each in by_set.items())


def _drift(name: str, paired: PairedMetric, p: float) -> Drift:
    d = paired.difference
    # The interval is what reports show, and p is what bounds false alarms over all sets: a fall has to be one by both.
    return Drift(name, paired.before, paired.after, d.mean, d.low, d.high, d.n, p, d.significant and d.mean < 0 and p < _ALPHA)


def _chance(compared: Comparison, metric: str, seed: int) -> float:
    """Return how often the mean difference would be as large if each pair's difference had either sign by chance."""
    values = [(METRICS[metric](before), METRICS[metric](after)) for before, after in compared.matched.pairs]
    differences = np.array([after - before for before, after in values if before is not None and after is not None])
    moved = differences[differences != 0]
    if moved.size == 0:
        return 1.0
    rng, seen, left = np.random.default_rng(seed), 0, _FLIPS
    while left:
        drawn = min(left, max(1, _BLOCK // moved.size))
        signs = rng.integers(0, 2, size=(drawn, moved.size), dtype=np.int8) * 2 - 1
        # Sums of equal numbers in another order differ by rounding.
        seen += int((np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9).sum())
        left -= drawn
    # What was seen is itself one of the possible signs; without it p could be 0, which no test by drawing can show.
    return (seen + 1) / (_FLIPS + 1)
