"""What a benchmark plays: the section `bench` of the configuration, or what a command names instead, as a matrix of cells.

Knows the configuration and models; plays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from research_rl.config import BenchConfig, BenchModel, Config
from research_rl.errors import ConfigError
from research_rl.evaluation import cells
from research_rl.evaluation.cells import Registry
from research_rl.evaluation.matrix import Matrix
from research_rl.pipeline.stages import Workspace

__all__ = ["chosen", "matrix"]


def chosen(default: BenchConfig, models: Sequence[str] | None, methods: str | None, sets: str | None, samples: int | None) -> BenchConfig:
    """Return `default` with what a command named in its place; names in a text are separated by commas.

    A named model that `default` has, too, keeps its prompt. Methods that are named count for every model. Raises ConfigError.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples} plays nothing; the least is 1")
    known = {each.model: each for each in default.models}
    # A section may hold a model twice, with two prompts.
    selected = [known.get(name, BenchModel(model=name)) for name in models] if models else list(default.models)
    if methods:
        selected = [each.model_copy(update={"methods": ()}) for each in selected]
    named = {"models": tuple(selected), "methods": _names(methods), "sets": _names(sets), "samples": samples}
    return default.model_copy(update={name: value for name, value in named.items() if value})


def matrix(bench: BenchConfig, config: Config, workspace: Workspace, registry: Registry | None = None) -> Matrix:
    """Return the matrix of a section. Raises ConfigError, ModelError and ServiceError for a model that cannot be had."""
    models = [replace(cells.model(each.model, config, workspace, registry), prompt=each.prompt) for each in bench.models]
    own = {model: each.methods for model, each in zip(models, bench.models, strict=True) if each.methods}
    return Matrix(models, bench.methods, bench.sets, bench.samples, own)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name for name in (text or "").split(",") if name)
