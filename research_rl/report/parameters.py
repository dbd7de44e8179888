"""Parameters of an evaluation, flat and side by side. Knows trees of values; knows no artifact but the evaluation's.

Addresses are shown without what may be secret in them: a user and a password, and the query of a signed address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research_rl.errors import DataError
from research_rl.pipeline.json_files import read_object

__all__ = ["Row", "differences", "flat", "public", "read"]

Row = tuple[str, str, str]

_USER = re.compile(r"(?<=://)[^/?#\s\"]*@")
_QUERY = re.compile(r"(://[^?#\s\"]*)\?[^\s\"]*")


def read(folder: Path) -> dict[str, Any]:
    """Return the sections of the configuration that decided an evaluation artifact."""
    return read_object(folder / "parameters.json", DataError, "evaluate again")


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested parameters by dotted name."""
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """Return (name, in A, in B) of each differing parameter; a section that only one of the two trees has is one row."""
    # Stages record different sections: listing each of their parameters would bury the real differences.
    alone = {*a} ^ {*b}
    leaves_a, leaves_b = flat(a), flat(b)
    # `...` stands for absent: None is a value that a parameter may have.
    names = [
        name
        for name in sorted({*leaves_a, *leaves_b})
        if name.partition(".")[0] not in alone and leaves_a.get(name, ...) != leaves_b.get(name, ...)
    ]
    rows = [(name, _value(leaves_a, name), _value(leaves_b, name)) for name in names]
    used = ("not used", "used")
    return rows + [(f"{name} (all)", used[name in a], used[name in b]) for name in sorted(alone)]


def public(text: str) -> str:
    """Return a text in which every address lacks its user, password and query."""
    return _QUERY.sub(r"\1?…", _USER.sub("…@", text))


def _value(parameters: Mapping[str, Any], name: str) -> str:
    return public(json.dumps(parameters[name], ensure_ascii=False)) if name in parameters else "absent"
