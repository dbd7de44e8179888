"""Play a matrix of cells: what is missing, model by model, over one retriever. Knows services and cells; leaves episodes to `evaluate`.

Invariants: (1) a cell that stands is not played again, whatever name its model has; (2) a killed matrix repeats only the questions that
were in flight; (3) a method that a model cannot express is refused by name, and the other cells are played all the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby

from research_rl.config import Config
from research_rl.episode.prompts import load_tokenizer
from research_rl.evaluation import cells
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.evaluate import Player, passages_of, play_kept, write_evaluation
from research_rl.evaluation.evidence import Evidence, unchanged
from research_rl.evaluation.methods import LONGEST_PROMPT, find
from research_rl.evaluation.results import HeldOutQuestion, Result, UnfinishedResults, read_questions
from research_rl.evaluation.swapped import swapped
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Progress, Workspace
from research_rl.process.services import Endpoint
from research_rl.retriever.source import RetrieverSource, searching
from research_rl.serving.model import inspect
from research_rl.serving.serve import context_tokens

__all__ = ["CellOutcome", "Matrix", "Setting", "play", "play_missing", "refusal"]


@dataclass(frozen=True)
class Matrix:
    """What is to be played: models by method by question set; no set means all of the workspace's test questions.

    `own` holds the methods of a model that is played by others than `methods`. `evidence` holds changes of what searches find, each of
    which is played beside the plain cells.
    """

    models: Sequence[Model]
    methods: Sequence[str]
    sets: Sequence[str] = ()
    samples: int = 1
    own: Mapping[Model, Sequence[str]] = field(default_factory=dict[Model, Sequence[str]])
    evidence: Sequence[Evidence] = ()

    def methods_of(self, each: Model) -> Sequence[str]:
        """Return the methods that a model is played by."""
        return self.own.get(each, self.methods)


@dataclass(frozen=True)
class Setting:
    """What cells are played in: the configuration, the workspace whose index is searched, their parents, and the questions of each set."""

    config: Config
    workspace: Workspace
    built: dict[str, Manifest]
    questions: dict[str, list[HeldOutQuestion]]


@dataclass(frozen=True)
class CellOutcome:
    """A cell with its artifact, or why its method was refused for its model."""

    cell: Cell
    manifest: Manifest | None
    refusal: str | None = None


def play(config: Config, workspace: Workspace, matrix: Matrix, progress: Progress) -> list[CellOutcome]:
    """Return every cell of the matrix, played now or before.

    Raises ConfigError, ModelError, ManifestError and ServiceError, and DataError for searches that a replayed tape lacks.
    """
    for name in (name for each in matrix.models for name in matrix.methods_of(each)):
        find(name)  # an unknown method is refused before anything starts
    built = cells.parents(workspace, config)
    for change in matrix.evidence:
        change.require(built["index"].facts)
    questions = read_questions(workspace.folder("prepare") / "test.parquet", config.evaluation.rows, config.evaluation.rows_per_set)
    sets = cells.question_sets(questions, matrix.sets)
    selected = [
        cell
        for each in matrix.models
        for cell in cells.cells(config, workspace, built, [each], matrix.methods_of(each), list(sets), matrix.samples, matrix.evidence)
    ]
    # What was named twice by one name is one row.
    return play_missing(Setting(config, workspace, built, sets), list(dict.fromkeys(selected)), progress)


def play_missing(setting: Setting, selected: Sequence[Cell], progress: Progress) -> list[CellOutcome]:
    """Return cells of one setting, those that do not stand played now. Raises as `play`.

    A model that is named in two ways is played once, and each name has its outcome.
    """
    # Reversed, so that of equal cells the one that was named first is played, under its name.
    distinct = {cell.hash: cell for cell in reversed(selected)}
    # Every byte of a cell is read for this, so it is asked once.
    standing = {hash: cells.standing(cell) for hash, cell in distinct.items()}
    refused = {hash: refusal(setting, cell) for hash, cell in distinct.items() if standing[hash] is None}
    missing = [cell for cell in selected if cell is distinct[cell.hash] and cell.hash in refused and not refused[cell.hash]]
    if missing:
        total = len(distinct) - sum(map(bool, refused.values()))
        _Session(setting, progress, total, total - len(missing)).play(missing)
        standing |= {cell.hash: cells.standing(cell) for cell in missing}
    return [CellOutcome(cell, standing[cell.hash], refused.get(cell.hash)) for cell in selected]


def refusal(setting: Setting, cell: Cell) -> str | None:
    """Return why the method of a cell cannot be played with its model, questions and evidence, None when it can."""
    questions, method = setting.questions[cell.question_set], find(cell.method)
    prompt = cell.model.config(setting.config, setting.workspace).prompt
    if cell.evidence and not method.searches:
        return f"{cell.method} shows nothing that a search found, so there is no evidence to change"
    change = cell.evidence.refusal(questions) if cell.evidence else None
    return change or method.refusal(load_tokenizer(cell.model.folder), prompt, questions)


def _context(config: Config, each: Model, methods: Iterable[str]) -> int:
    """Return the tokens of the longest sequence that the methods need, at most what the model reads."""
    needed = context_tokens(config)
    if any(find(name).separate_calls for name in methods):
        longest = LONGEST_PROMPT + config.episode.max_response_tokens
        reads = each.offer.context if each.offer else inspect(each.folder).positions
        # A model that reads less is served all the same: `fitted` cuts its prompts.
        needed = max(needed, min(longest, reads or longest))
    return needed


@dataclass(frozen=True)
class _Searched:
    """Where searches are answered, and the workspace whose index that is."""

    source: RetrieverSource
    workspace: Workspace


def _swap(cell: Cell) -> str | None:
    """Return the kind of index that is searched in the place of the workspace's own."""
    return cell.evidence.value if cell.evidence and cell.evidence.kind == "swap" else None


@dataclass
class _Session:
    """One retriever for each index, one model server for all cells of a model."""

    setting: Setting
    progress: Progress
    total: int
    done: int

    def play(self, missing: Sequence[Cell]) -> None:
        with ExitStack() as services:
            # Before any model is served: an index may have to be built.
            kinds = dict.fromkeys(_swap(cell) for cell in missing)
            searched = {kind: self._searched(kind, services) for kind in kinds}
            # Cells come model by model, so this makes one group of each model, and one start of its server.
            for each, group in groupby(missing, key=lambda cell: cell.model):
                self._model(each, list(group), searched)

    def _searched(self, kind: str | None, services: ExitStack) -> _Searched:
        """Start the retriever of the workspace's index, or of one of another kind in its place."""
        config, workspace = self.setting.config, self.setting.workspace

        def report(text: str, _: float) -> None:
            self.progress(text, self.done / self.total)

        if kind:
            config, workspace = swapped(kind, config, workspace, report)
        report(f"starting the retriever{f' of kind {kind}' if kind else ''}", 0.0)
        return _Searched(services.enter_context(searching(config, workspace)), workspace)

    def _model(self, each: Model, those: Sequence[Cell], searched: Mapping[str | None, _Searched]) -> None:
        from research_rl.serving.serve import running as model_running

        self.progress(f"starting the model server for {each.name}", self.done / self.total)
        config = each.config(self.setting.config, self.setting.workspace)
        context = _context(config, each, (cell.method for cell in those))
        server = model_running(config, self.setting.workspace, each.folder, name="cell-model", context=context, offer=each.offer)
        with server as served:
            for cell in those:
                self._cell(cell, config, served, searched[_swap(cell)], context)
                self.done += 1

    def _cell(self, cell: Cell, config: Config, served: Endpoint, searched: _Searched, context: int) -> None:
        questions, workspace = self.setting.questions[cell.question_set], self.setting.workspace
        journal = UnfinishedResults(cell.journal)

        def report(text: str, share: float) -> None:
            self.progress(f"{cell.label}: {text}", (self.done + share) / self.total)

        passages = passages_of(workspace.folder("corpus"))
        # Each repetition draws by a seed of its own, or all of them would be equal.
        method, seed = find(cell.method), config.evaluation.seed + cell.sample
        left = context - config.episode.max_response_tokens
        change = cell.evidence.change(questions, passages, seed) if cell.evidence else unchanged
        player = Player(config, load_tokenizer(cell.model.folder), method, seed, passages, left, change)
        play_kept(player, questions, served, searched.source, journal, searched.workspace, report)
        self._publish(cell, config, [journal.results[question.row] for question in questions])
        shutil.rmtree(cell.journal.parent, ignore_errors=True)

    def _publish(self, cell: Cell, config: Config, results: Sequence[Result]) -> None:
        recorded = cells.recorded(config)
        with manifest.publish(cell.folder, cells.STAGE, cell.hash, self.setting.built, cell.facts) as staging:
            write_evaluation(staging, config, results, {**recorded, "cell": cell.facts})
