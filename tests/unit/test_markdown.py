"""Text from data stays inside its table cell and reaches a terminal without control characters."""

from __future__ import annotations

import pytest

from research_rl.report import markdown
from research_rl.terminal import printable


def test_a_cell_holds_bars_line_feeds_tags_and_control_characters_without_ending() -> None:
    made = markdown.table(("name", ""), [("a|b\nc", "<img src=x onerror=alert(1)>\x1b[2J"), ("`code`", "[page](http://x)")])
    assert made.splitlines() == [
        "| name |  |",
        "|---|---|",
        "| a\\|b c | &lt;img src=x onerror=alert(1)>\\x1b[2J |",
        "| `code` | [page](http://x) |",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Zürich, 東京, 🙂", "plain, Zürich, 東京, 🙂"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;title\x07\x1b[31mred", "\\x1b]0;title\\x07\\x1b[31mred"),
        ("over\rwritten \x9b31m \x00", "over\\x0dwritten \\x9b31m \\x00"),
        ("abc\u202edcba \ud800 \u2028", "abc\\u202edcba \\ud800 \\u2028"),
    ],
)
def test_only_what_a_terminal_would_obey_is_written_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.encode()
