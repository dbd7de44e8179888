"""Results of an evaluation as `to_result` makes them, from what a policy wrote and a search showed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.episode.trajectory import Author, SearchFault, SearchRecord, Segment, StopReason, Trajectory
from research_rl.evaluation import cells
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.matrix import CellOutcome
from research_rl.evaluation.results import HeldOutQuestion, Result, to_result
from research_rl.pipeline import manifest
from research_rl.reward.rules import grade

EOS = "<eos>"
CONFIG = Config()


def played(
    row: int,
    answer: str,
    searches: Sequence[tuple[str, str]] = (),
    *,
    golds: Sequence[str] = ("Ada",),
    question: str | None = None,
    source: str = "made",
    stop: StopReason = StopReason.ANSWERED,
    cut_is_empty: bool = False,
) -> Result:
    """Return the result of an episode with these (query, passage shown) pairs and this boxed answer; "" shows a search's failure."""
    trajectory = Trajectory((1, 2), stop=stop, ended_by_eos=stop is StopReason.ANSWERED)
    for number, (query, passage) in enumerate(searches):
        fault = None if passage else SearchFault.NOTHING
        trajectory.segments.append(_segment(Author.MODEL, f"<think>t</think><search>{query}</search>"))
        trajectory.segments.append(_segment(Author.SEARCH, f" <result>\n{passage or 'no passage was found'}\n</result>"))
        trajectory.searches.append(SearchRecord(query, (f"p{number}",) if passage else (), 0.01, None, fault))
    trajectory.segments.append(_segment(Author.MODEL, f"<think>so</think><answer>\\boxed{{{answer}}}</answer>"))
    asked = HeldOutQuestion(row, f"q{row}", source, question or f"Question {row}?", tuple(golds), ())
    trained = grade(trajectory, golds, "repository", EOS)
    return to_result(asked, trajectory, trained, EOS, 0.1, cut_is_empty=cut_is_empty)


def lost(row: int, source: str = "made") -> Result:
    """Return the result of an episode that the model server ended before it answered."""
    return played(row, "", source=source, stop=StopReason.ENGINE_FAILURE)


def _segment(author: Author, text: str) -> Segment:
    ids = tuple(range(len(text.split())))
    return Segment(author, ids, (0.0,) * len(ids), text)


def standing(root: Path, model: Model, method: str, results: Sequence[Result], **settings: Any) -> CellOutcome:
    """Publish these results of one question set as a cell below `root`; `settings` are `sample`, `config` and `built`."""
    sample, config, built = settings.get("sample", 0), settings.get("config", CONFIG), settings.get("built", {})
    name = hashlib.sha256(repr((model, method, results[0].data_source, sample, config, built)).encode()).hexdigest()
    cell = Cell(model, method, results[0].data_source, sample, name, root)
    with manifest.publish(cell.folder, cells.STAGE, cell.hash, built, cell.facts) as staging:
        write_evaluation(staging, config, results, {**cells.recorded(config), "cell": cell.facts})
    return CellOutcome(cell, manifest.load(cell.folder))
