"""YAML as parameters need it: plain values alone. Knows no parameter.

Invariants: (1) whatever a text holds, it is read in bounded memory or refused with one message; (2) what is read can be written again.
An alias can stand for as much as the text before it, so that a few lines become gigabytes: none is read.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from research_rl.errors import ConfigError

__all__ = ["MOST_BYTES", "read_yaml"]

MOST_BYTES = 1 << 18
_DEEPEST = 50
# The parser in C takes a tenth of the time; PyYAML may be built without it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Plain(_Loader):
    """A safe loader that refuses a key that stands twice in a mapping, of which it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises ConfigError."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise ConfigError(f"has {twice[:80]!r} twice in the mapping from line {node.start_mark.line + 1} on; remove one")
        return super().construct_mapping(node, deep)


# As YAML 1.2 reads them: 1.1, which PyYAML reads, takes off for false and 1:30 for 90. DVC writes 1.2, where both are texts without quotes.
_KINDS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_TAGS = {kind: f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
_Plain.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _TAGS.values()] for first, rules in _Loader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _KINDS.items():
    _Plain.add_implicit_resolver(_TAGS[_kind], re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ConfigError; its message begins with a verb, for the caller to put the name before it."""
    if len(text) > MOST_BYTES:
        raise ConfigError(f"is longer than {MOST_BYTES:,} characters; parameters take a few thousand")
    try:
        # Before anything is built: an alias is refused by its event, without what it stands for.
        _check_events(text)
        return yaml.load(text, _Plain)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"is not YAML ({error.problem or error.context or 'malformed'}{where})") from None
    except (yaml.YAMLError, ValueError) as error:  # a character or a number that YAML has not, a date that no calendar has
        raise ConfigError(f"is not YAML ({str(error).splitlines()[0]})") from None


def _check_events(text: str) -> None:
    """Raise ConfigError for an alias, and for brackets nested so deeply that building them would need another stack."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"has an alias in line {event.start_mark.line + 1}; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"is nested more than {_DEEPEST} deep in line {event.start_mark.line + 1}; parameters are nested a few times")
