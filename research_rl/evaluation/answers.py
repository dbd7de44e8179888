"""Answers of models to questions of the workspace: kept by cell, so that gates and nights ask nothing twice. Leaves episodes to `evaluate`.

Invariants: (1) answers are kept by the hash of their cell, so no model is asked a question twice unless set, index or protocol changed;
(2) a process that is killed repeats only the questions that were in flight; (3) a service is started when the first question needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from research_rl.config import Config
from research_rl.episode.prompts import load_tokenizer
from research_rl.errors import DataError, ModelError
from research_rl.evaluation import cells
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.evaluate import Player, passages_of, play_kept
from research_rl.evaluation.methods import find
from research_rl.evaluation.results import HeldOutQuestion, Result, UnfinishedResults, read_results
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import Progress, Workspace
from research_rl.process.services import Endpoint
from research_rl.retriever.source import RetrieverSource, searching

__all__ = ["METHOD", "Answers", "Asking", "answers"]

METHOD = "research"
logger = logging.getLogger(__name__)
_STAGES = {"evaluate": "export", "baseline": "policy"}
"""Stages whose artifacts hold answers of a policy, and the stage that left it."""


class Answers:
    """All answers of one model to the questions of some cells, by row; what is added is kept in the journal of its cell.

    A lost answer is kept for this process only, wherever it stands, so that the next one asks again.
    """

    def __init__(self, parts: Sequence[Cell], model: Model, more: Iterable[Result] = ()) -> None:
        self.cells, self.model = tuple(parts), model
        self._journals = {cell.question_set: UnfinishedResults(cell.journal) for cell in parts}
        self.results: dict[int, Result] = {}
        for cell in parts:
            published = read_results(cell.folder) if cells.standing(cell) else []
            # The journal, too: what a published cell had lost was asked again since.
            answered = (*published, *self._journals[cell.question_set].results.values())
            self.results |= {result.row: result for result in answered if not result.lost}
        for result in more:
            if result.data_source in self._journals and result.row not in self.results and not result.lost:
                # Into the journal too: the next training replaces the artifact that it came from.
                self.add(result)

    def add(self, result: Result) -> None:
        """Keep one answer."""
        self.results[result.row] = result
        if not result.lost:
            self._journals[result.data_source].add(result)

    def forget(self) -> None:
        """Drop every answer."""
        self.results.clear()
        for journal in self._journals.values():
            journal.forget()

    def lacking(self, questions: Sequence[HeldOutQuestion]) -> list[HeldOutQuestion]:
        """Return the questions without an answer."""
        return [question for question in questions if question.row not in self.results]


def answers(config: Config, workspace: Workspace, built: Mapping[str, Manifest], model: Model, sets: Sequence[str]) -> Answers:
    """Return what is known of a model's answers to these question sets, those of the stages baseline and evaluate among them."""
    parts = cells.cells(config, workspace, built, [model], [METHOD], sets, 1)
    return Answers(parts, model, _of_stages(config, workspace, model))


def _of_stages(config: Config, workspace: Workspace, model: Model) -> list[Result]:
    """Return what the stages baseline and evaluate have of this model, played under the present parameters."""
    for name, parent in _STAGES.items():
        artifact = current(name, config, workspace)
        if artifact and artifact.parents[parent] == model.sha256:
            try:
                return read_results(workspace.folder(name))
            except DataError as error:  # of a version before evaluations were marked by the one that graded them
                logger.warning("%s; its questions are asked again", error)
    return []


class Asking:
    """Asks models what has no answer yet, for the length of a block; `questions` are all that may be asked."""

    def __init__(self, config: Config, workspace: Workspace, questions: Sequence[HeldOutQuestion], progress: Progress) -> None:
        self.config, self.workspace, self.questions, self.progress = config, workspace, questions, progress
        self._retriever: RetrieverSource | None = None
        self._served: dict[str, tuple[Player, Endpoint, ExitStack]] = {}
        self._services = ExitStack()

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._services.close()

    def ask(self, side: Answers, questions: Sequence[HeldOutQuestion]) -> None:
        """Ask those of `questions` that have no answer. Raises ConfigError, ModelError and ServiceError."""
        if not side.lacking(questions):
            return
        retriever, (player, served, _) = self._searching(), self._serving(side.model)

        def report(_: str, __: float) -> None:
            done, total = len(side.results), len(self.questions)
            self.progress(f"{side.model.name}: {done:,} of {total:,} questions answered", done / total)

        lost = sum(result.lost for result in side.results.values())
        # Of all questions: in a batch of 32 one that is lost would be more than the share that an evaluation allows.
        most = self.config.evaluation.max_failures * len(self.questions) - lost
        play_kept(player, questions, served, retriever, side, self.workspace, report, most)

    def release(self, side: Answers) -> None:
        """End the model's server, if it was started."""
        if served := self._served.pop(side.model.sha256, None):
            served[2].close()

    def _searching(self) -> RetrieverSource:
        if self._retriever is None:
            self.progress("starting the retriever", 0.0)
            self._retriever = self._services.enter_context(searching(self.config, self.workspace))
        return self._retriever

    def _serving(self, model: Model) -> tuple[Player, Endpoint, ExitStack]:
        from research_rl.serving.serve import running

        # By content: the two names of one model share a server.
        if model.sha256 not in self._served:
            player = self._player(model)
            self.progress(f"starting the model server for {model.name}", 0.0)
            # A stack of its own, so that `release` ends this server alone.
            services = self._services.enter_context(ExitStack())
            # With the hash: two servers of one workspace have a file each for their process.
            server = running(self.config, self.workspace, model.folder, name=f"asked-model-{model.sha256[:8]}", offer=model.offer)
            served = services.enter_context(server)
            self._served[model.sha256] = (player, served, services)
        return self._served[model.sha256]

    def _player(self, model: Model) -> Player:
        config = model.config(self.config, self.workspace)
        tokenizer, method = load_tokenizer(model.folder), find(METHOD)
        if refusal := method.refusal(tokenizer, config.prompt, self.questions):
            raise ModelError(f"{model.name} cannot be played: {refusal}")
        return Player(config, tokenizer, method, config.evaluation.seed, passages_of(self.workspace.folder("corpus")))
