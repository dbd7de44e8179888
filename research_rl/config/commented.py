"""Change values in YAML text and leave all else as it stands, comments first of all. Knows text and nodes; knows no parameter.

Invariant: the text that is returned reads as the tree that was asked for, or none is returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import yaml

__all__ = ["merged"]

Edit = tuple[int, int, str]
"""Text to put in place of the characters from a first one up to another."""


def merged(text: str, tree: Mapping[str, Any]) -> str | None:
    """Return `text` with its values changed to those of `tree`; None where that takes more than changing and adding keys.

    A value that changed is written anew in one line; comments inside it move above its key.
    """
    try:
        root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        before = yaml.safe_load(text)
        if not _is_block(root):
            return None
        # From the end on, so that the places of the edits before it stay right.
        for start, end, new in sorted(_edits(root, before, tree, text), reverse=True):
            text = text[:start] + new + text[end:]
        return text if yaml.safe_load(text) == tree else None
    except (yaml.YAMLError, ValueError):
        return None


def _is_block(node: Any) -> bool:
    return isinstance(node, yaml.MappingNode) and not node.flow_style and bool(node.value)


def _edits(node: Any, before: Mapping[str, Any], after: Mapping[str, Any], text: str) -> Iterator[Edit]:
    nodes = {key.value: (key, value) for key, value in node.value}
    for name, value in after.items():
        if name not in nodes or (name in before and before[name] == value):
            continue
        key, old = nodes[name]
        if _is_block(old) and isinstance(value, Mapping) and set(before[name]) <= set(cast(Mapping[str, Any], value)):
            yield from _edits(old, before[name], cast(Mapping[str, Any], value), text)
        else:
            yield from _replaced(key, old, value, text)
    if missing := {name: value for name, value in after.items() if name not in nodes}:
        yield _added(node, missing, text)


def _replaced(key: Any, old: Any, value: Any, text: str) -> Iterator[Edit]:
    start, end = key.end_mark.index, _end(old)
    # In flow style and as wide as it takes: one line, whatever the value holds.
    yield start, end, f": {yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()[1:-1]}"
    # A # within a scalar begins no comment, so scalars are painted over before comments are looked for.
    masked = text
    for first, last in _scalars(old):
        masked = masked[:first] + "x" * (last - first) + masked[last:]
    if comments := re.findall("#[^\n]*", masked[start:end]):
        line = text.rfind("\n", 0, start) + 1
        yield line, line, "".join(f"{' ' * key.start_mark.column}{comment}\n" for comment in comments)


def _added(node: Any, missing: Mapping[str, Any], text: str) -> Edit:
    """Return the lines of new keys, below the last key of their mapping."""
    line = text.find("\n", _end(node))
    place = len(text) if line < 0 else line
    indent = " " * node.start_mark.column
    lines = yaml.safe_dump(dict(missing), sort_keys=False, allow_unicode=True, width=10**9).splitlines()
    return place, place, "".join(f"\n{indent}{line}" for line in lines)


def _end(node: Any) -> int:
    """Return where a node's text ends; a block collection's own mark stands behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last: Any = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _scalars(node: Any) -> Iterator[tuple[int, int]]:
    """Yield where the scalars of a node stand, its keys included."""
    if isinstance(node, yaml.ScalarNode):
        yield node.start_mark.index, node.end_mark.index
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(key)
            yield from _scalars(value)
    else:
        for item in node.value:
            yield from _scalars(item)
