"""Published results, and whether ours are in their binomial band. Knows the file `published.yaml`, models' names and numbers.

A band is the 95 % interval (Clopper and Pearson) of the published share on as many questions as ours or theirs has, whichever is fewer: a
smaller sample of the same questions scatters more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from research_rl.config import Config, Section
from research_rl.config.plain_yaml import read_yaml
from research_rl.errors import ConfigError
from research_rl.evaluation.cells import Cell, Model
from research_rl.evaluation.intervals import binomial
from research_rl.evaluation.results import Result

__all__ = ["Family", "Placed", "Publication", "Value", "against", "publication", "values"]

Metric = Literal["em", "judge"]


class Family(Section):
    """Results of one model: percent by method, metric and question set."""

    name: str
    models: tuple[str, ...]
    trained_from: str | None = None
    methods: dict[str, dict[Metric, dict[str, float]]]


class Publication(Section):
    """Results of one paper; `sets` holds the number of questions of each set, `judge` is the model whose verdicts it gives."""

    source: str
    judge: str
    sets: dict[str, int]
    families: tuple[Family, ...]


@dataclass(frozen=True)
class Value:
    """A published share, between 0 and 1, of the `n` questions of a cell's set."""

    cell: Cell
    family: str
    share: float
    n: int

    def beside(self, ours: float, n: int) -> Placed:
        """Place our share of `n` questions."""
        fewer = min(n, self.n)
        return Placed(self.cell, self.family, ours, self.share, *binomial(self.share * fewer, fewer), fewer)


@dataclass(frozen=True)
class Placed:
    """Our mean beside the published one, both between 0 and 1, with the published one's band on `n` questions."""

    cell: Cell
    family: str
    ours: float
    published: float
    low: float
    high: float
    n: int

    @property
    def place(self) -> str:
        """Where ours is: inside the band, below or above it."""
        return "below" if self.ours < self.low else "above" if self.ours > self.high else "inside"


@cache
def _publications() -> dict[str, Publication]:
    tree = read_yaml(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return {name: Publication.model_validate(entry) for name, entry in tree.items()}


def publication(name: str) -> Publication:
    """Return the publication of this name. Raises ConfigError naming those that are known."""
    if name not in _publications():
        raise ConfigError(f"--against {name} is not known; name one of {', '.join(_publications())}")
    return _publications()[name]


def against(published: Publication, results: Mapping[Cell, list[Result]], config: Config) -> Iterator[Placed]:
    """Yield the exact match of every cell that has a published one. `config` says what the workspace's policy is."""
    for value in values(published, results, config, "em"):
        those = results[value.cell]
        yield value.beside(sum(result.em for result in those) / len(those), len(those))


def values(published: Publication, cells: Iterable[Cell], config: Config, metric: Metric) -> Iterator[Value]:
    """Yield the published value of every cell that has one: of drawn samples for the first, and for none with changed evidence."""
    for cell in cells:
        family = next((each for each in published.families if _is(each, cell.model, config) and cell.method in each.methods), None)
        # Publications report one run without changes, so repetitions and changed evidence have nothing to stand beside.
        shares = family.methods[cell.method].get(metric, {}) if family and not cell.sample and cell.evidence is None else {}
        if family and cell.question_set in shares:
            yield Value(cell, family.name, shares[cell.question_set] / 100, published.sets[cell.question_set])


def _is(family: Family, model: Model, config: Config) -> bool:
    """Whether a model is one of a family: by its name, or as the workspace's policy before and after training."""
    if model.name == "after":
        return family.trained_from is not None and family.trained_from == config.policy.path
    name = config.policy.path if model.name == "before" else model.name
    return name is not None and any(name in (known, known.rpartition("/")[2]) for known in family.models)
