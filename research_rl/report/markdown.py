"""Write tables in GitHub's Markdown. Knows how a cell is quoted; knows no metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from research_rl.terminal import printable

__all__ = ["table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, without a line feed at its end; `head` may hold empty names.

    A cell may use inline Markdown such as `code` or a link. A bar, a line feed or a tag in it neither ends the cell nor
    becomes markup, and control characters are shown as escapes, so that the table may be printed as well as rendered.
    """
    return "\n".join((_row(head), "|" + "---|" * len(head), *map(_row, rows)))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    # A tag needs its opening bracket alone to be escaped; inline code keeps its closing ones readable.
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
