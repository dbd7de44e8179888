"""Play evaluations that stand between two others: some components of the one, the rest of the other, each crossing as cells.

Knows artifacts and where ingredients may be; leaves what is exchanged when to `blame`. Invariants: (1) an ingredient counts only by its
hash, wherever it is found; (2) a crossing is the same artifact as a cell of `research evaluate` that is played with the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from research_rl.config import Config
from research_rl.config.template_text import template_text
from research_rl.errors import ConfigError, DataError, ManifestError
from research_rl.evaluation import cells
from research_rl.evaluation.blame import Crossing, Evaluated, ExchangePlan
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.evaluate import PROMPT
from research_rl.evaluation.matrix import Setting, play_missing
from research_rl.evaluation.methods import METHODS
from research_rl.evaluation.results import Result, read_questions, read_results
from research_rl.paths import cache_folder
from research_rl.pipeline import manifest
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.stages import Progress, Workspace
from research_rl.process.hub import cached

__all__ = ["STAGES", "Places", "evaluated", "gone", "places", "planned", "play"]

STAGES = ("baseline", "evaluate", cells.STAGE)
"""Stages whose artifacts are evaluations."""
_EVALUATED = [name for name in cells.SECTIONS if name.startswith("evaluation.")]
_T = TypeVar("_T")
_SECTIONS = {"data": ("data", "validation", "prepare"), "index": ("corpus", "encoder", "index", "reranker"), "limits": ("episode",)}
"""The sections of the configuration that belong to a component as a whole."""


@dataclass(frozen=True)
class Places:
    """Where ingredients are looked for: workspaces, the first of which takes the crossings; prompts; models beside the workspaces' own."""

    workspaces: tuple[Workspace, ...]
    prompts: tuple[Path, ...] = ()
    models: tuple[Model, ...] = ()


def evaluated(folder: Path) -> Evaluated:
    """Read an evaluation artifact with what it recorded. Raises ManifestError, and DataError for another kind of artifact."""
    artifact = manifest.load(folder)
    if artifact.stage not in STAGES:
        raise DataError(f"{folder} is the artifact of stage {artifact.stage}; an evaluation is one of {' and '.join(STAGES)}")
    if change := artifact.parameters.get("evidence"):
        raise DataError(f"{folder} was played {change}, which is no component that can be exchanged; compare it by `research compare`")
    recorded = read_object(folder / "parameters.json", DataError, "evaluate again")
    if lacking := [name for name in _EVALUATED if name not in recorded]:
        raise DataError(f"{folder} was evaluated by another version, which did not record {lacking[0]}; evaluate again")
    return Evaluated(folder, artifact, recorded, read_results(folder))


def places(workspace: Workspace, a: Evaluated, b: Evaluated, models: Sequence[Model] = ()) -> Places:
    """Return the places for two evaluations: this workspace, and those that hold them."""
    # A cell's folder lies one level deeper than a stage's, so the workspace is what holds the folder `artifacts`.
    roots = [parent.parent for each in (a, b) for parent in each.folder.resolve().parents if parent.name == "artifacts"]
    prompts = tuple(each.folder / PROMPT for each in (a, b))
    return Places(tuple(dict.fromkeys([workspace, *map(Workspace, roots)])), prompts, tuple(models))


def gone(each: Evaluated, where: Places) -> dict[str, str]:
    """Return why components of an evaluation cannot be played again, by component."""
    prepare, index = each.manifest.parents["prepare"], each.manifest.parents["index"]
    reasons = {
        "data": (_with(each, where, "prepare") is None, f"the prepared questions {prepare[:12]} are in no workspace"),
        "index": (_with(each, where, "corpus", "embed", "index") is None, f"the index {index[:12]} is in no workspace"),
        "prompt": (_prompt_text(each, where) is None, "its template was not kept"),
        "policy": (_model(each, where) is None, f"the model {each.model_sha256[:12]} is not found; name its folder by --model"),
        "method": (each.method not in METHODS, f"the method {each.method} is not known to this version"),
    }
    return {name: reason for name, (missing, reason) in reasons.items() if missing}


def planned(plan: ExchangePlan, a: Evaluated, b: Evaluated, where: Places, config: Config) -> dict[Crossing, list[tuple[Cell, bool]]]:
    """Return the cells of each crossing of a plan, and whether each stands. Raises ConfigError and ManifestError."""
    needed = {crossing: _cells(_Mixed(crossing, a, b, where, config))[1] for crossing in plan.crossings}
    return {crossing: [(cell, cells.standing(cell) is not None) for cell in members] for crossing, members in needed.items()}


def play(plan: ExchangePlan, a: Evaluated, b: Evaluated, where: Places, config: Config, progress: Progress) -> dict[Crossing, list[Result]]:
    """Return the results of A, of B and of every crossing, those that do not stand played now.

    Raises as `matrix.play`, and ConfigError for a crossing whose model cannot express its method.
    """
    points = {frozenset[str](): list(a.results), plan.everything: list(b.results)}
    for number, crossing in enumerate(plan.crossings):
        setting, needed = _cells(_Mixed(crossing, a, b, where, config))
        outcomes = play_missing(setting, needed, partial(_told, progress, number, len(plan.crossings)))
        if refusal := next((item.refusal for item in outcomes if item.refusal), None):
            names = ",".join(sorted(crossing))
            raise ConfigError(f"with {names} of B and the rest of A nothing can be played: {refusal}; exchange more at once by --together")
        points[crossing] = [result for item in outcomes for result in read_results(item.cell.folder)]
    return points


def _told(progress: Progress, number: int, total: int, text: str, share: float) -> None:
    progress(f"crossing {number + 1} of {total}: {text}", (number + share) / total)


@dataclass(frozen=True)
class _Mixed:
    """The ingredients of one crossing."""

    crossing: Crossing
    a: Evaluated
    b: Evaluated
    where: Places
    base: Config

    def side(self, component: str) -> Evaluated:
        return self.b if component in self.crossing else self.a

    def config(self) -> Config:
        """Return the caller's configuration with what both evaluations recorded in its place."""
        tree = self.base.model_dump(mode="json")
        for component, sections in _SECTIONS.items():
            recorded = self.side(component).parameters
            tree |= {name: recorded[name] for name in sections if name in recorded}
        # B's reward grades every crossing: it decides no answer, and grades of two rewards could not be compared.
        tree |= {"prompt": self._prompt(), "evaluation": self._evaluation(), "reward": self.b.parameters["reward"]}
        tree["judge"] |= {name: self.b.parameters[f"judge.{name}"] for name in ("url", "max_tokens")}
        tree["serving"] |= {name: self.side("engine").parameters[f"serving.{name}"] for name in ("engine", "dtype")}
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise ManifestError(
                f"{self.a.folder} or {self.b.folder} recorded {where}, which this version refuses; evaluate again"
            ) from None

    def _evaluation(self) -> dict[str, Any]:
        taken = {"data": ("rows", "rows_per_set"), "sampling": ("temperature", "seed"), "limits": ("published_limits",)}
        exchanged = {name: self.side(part).parameters[f"evaluation.{name}"] for part, names in taken.items() for name in names}
        # What decides nothing, such as how many episodes run at once, is the caller's.
        return {**self.base.evaluation.model_dump(mode="json"), "bootstrap": self.b.parameters["evaluation.bootstrap"], **exchanged}

    def _prompt(self) -> dict[str, Any]:
        recorded: Mapping[str, Any] = self.side("prompt").parameters["prompt"]
        path = self._prompt_file(recorded["sha256"]) if recorded["template"] == "file" else None
        return {"template": recorded["template"], "path": path, "max_tokens": recorded["max_tokens"]}

    def _prompt_file(self, sha256: str) -> str:
        file = self.where.workspaces[0].work("prompts") / f"{sha256[:16]}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((_prompt_text(self.side("prompt"), self.where) or "").encode())
        return str(file)


def _cells(mixed: _Mixed) -> tuple[Setting, list[Cell]]:
    """Return the cells of a crossing, one a question set of the questions that A and B share, and what they are played in."""
    config, root = mixed.config(), mixed.where.workspaces[0]
    data = _found(_with(mixed.side("data"), mixed.where, "prepare"), "data")
    index = _found(_with(mixed.side("index"), mixed.where, "corpus", "embed", "index"), "index")
    folders = {"prepare": data.folder("prepare"), **{name: index.folder(name) for name in ("corpus", "embed", "index")}}
    built = {name: manifest.load(folder, verify=False) for name, folder in folders.items()}
    shared = {result.key for result in mixed.a.results} & {result.key for result in mixed.b.results}
    names = sorted({source for source, _, _ in shared})
    sets = cells.question_sets(
        read_questions(folders["prepare"] / "test.parquet", config.evaluation.rows, config.evaluation.rows_per_set), names
    )
    each, method, sample = (
        _found(_model(mixed.side("policy"), mixed.where), "policy"),
        mixed.side("method").method,
        mixed.side("sampling").sample,
    )
    # `cells` numbers repetitions from 0, and only the one that was recorded is played.
    needed = [cell for cell in cells.cells(config, root, built, [each], [method], names, sample + 1) if cell.sample == sample]
    return Setting(config, index, built, sets), needed


def _found(ingredient: _T | None, component: str) -> _T:
    if ingredient is None:
        raise ManifestError(f"what the {component} of one evaluation was made of is gone; `gone` names it before anything is planned")
    return ingredient


def _with(each: Evaluated, where: Places, *stages: str) -> Workspace | None:
    """Return the workspace that holds an evaluation's artifacts of these stages now, None when there is none."""
    hashes = {name: each.manifest.parents[name] for name in stages}
    return next((workspace for workspace in where.workspaces if {name: _hash(workspace.folder(name)) for name in stages} == hashes), None)


def _model(each: Evaluated, where: Places) -> Model | None:
    """Return the model of an evaluation, looked for in the workspaces, among the named ones and in the hub's cache."""
    for workspace in where.workspaces:
        for name, stage in (("before", "policy"), ("after", "export")):
            if _hash(workspace.folder(stage)) == each.model_sha256:
                return Model(name, workspace.folder(stage), each.model_sha256)
    if named := next((model for model in where.models if model.sha256 == each.model_sha256), None):
        return named
    name = str(each.manifest.parameters.get("model", ""))
    folder = cached(name, "main", cache_folder() / "hub") if "/" in name else None
    fits = folder is not None and cells.content_sha256(folder, where.workspaces[0]) == each.model_sha256
    return Model(name, folder, each.model_sha256) if folder and fits else None


def _prompt_text(each: Evaluated, where: Places) -> str | None:
    """Return the template of an evaluation: one kept beside results, or the package's own where that is still the same."""
    recorded: Mapping[str, Any] = each.parameters["prompt"]
    if recorded["template"] == "file":
        # As bytes: the hash is of the file as it is, and reading text would translate its newlines.
        texts = [path.read_bytes().decode() for path in where.prompts if path.is_file()]
    else:
        # Base and instruct are played from the package alone.
        texts = [template_text(recorded["template"], None)]
    return next((text for text in texts if hashlib.sha256(text.encode()).hexdigest() == recorded["sha256"]), None)


def _hash(folder: Path) -> str | None:
    artifact = manifest.found(folder, verify=False)
    return artifact.hash if artifact else None
