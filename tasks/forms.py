"""What Prefect's parameter form offers: profiles and stages to choose from, fields for parameters that are set often. Knows names only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from research_rl.config import profiles
from research_rl.errors import ConfigError
from research_rl.pipeline.stages import STAGES

__all__ = ["Profile", "StageName", "merged"]

if TYPE_CHECKING:
    Profile = str
    StageName = str
else:
    # The names are read when a flow is loaded, so that a profile added to configs/ is offered without a change here.
    Profile = Literal[tuple(profiles())]
    StageName = Literal[tuple(STAGES)]

_FIELDS = {
    "research-train": {"steps": "train.steps", "seed": "seed"},
    "research-eval": {"seed": "evaluation.seed"},
    "research-bench": {"seed": "evaluation.seed"},
}
"""By flow: the fields of its form that stand for one parameter each, and the names of those."""


def merged(flow: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of a run of `flow`: its parameter `overrides`, and what its fields name; an empty field names nothing.

    Raises ConfigError for a field that `overrides` contradicts or repeats.
    """
    overrides = dict(parameters.get("overrides") or {})
    fields = {field: name for field, name in _FIELDS.get(flow, {}).items() if parameters.get(field) is not None}
    for field, name in fields.items():
        if _names(overrides, name.split(".")):
            raise ConfigError(f"{field}={parameters[field]!r:.200} and overrides both set {name}; leave one of the two out")
    return overrides | {name: parameters[field] for field, name in fields.items()}


def _names(overrides: Mapping[str, Any], path: Sequence[str]) -> bool:
    """Whether overrides set the parameter at `path`, by its dotted name or within a mapping given to its section."""
    for stop in range(1, len(path) + 1):
        key, rest = ".".join(path[:stop]), path[stop:]
        if key in overrides and not rest:
            return True
        if isinstance(inner := overrides.get(key), Mapping) and _names(cast(Mapping[str, Any], inner), rest):
            return True
    return False
