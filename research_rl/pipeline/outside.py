"""The user's own files that a stage was built from: which of them hold something else now. Knows files and hashes; knows no stage.

Invariant: files that are not on this machine count as unchanged, because an artifact may be used where its source never was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from research_rl.pipeline.verified import Verified

__all__ = ["differences"]


def differences(parameter: str, recorded: Mapping[str, str], files: Mapping[str, Path], verified: Verified) -> list[str]:
    """Return one line for every file that is not what the artifact recorded; none where no file is there at all.

    `recorded` are sha256 by name, `files` what `parameter` leads to now, by the same names. A file is read again only when it changed.
    """
    if not files:
        return []
    states = {name: _state(recorded.get(name), files.get(name), verified) for name in sorted({*recorded, *files})}
    return [f"{parameter}: {name} {state}" for name, state in states.items() if state]


def _state(before: str | None, path: Path | None, verified: Verified) -> str:
    if path is None:
        return "is gone"
    if before is None:
        return "is new"
    return "" if verified.sha256(path) == before else "changed"
