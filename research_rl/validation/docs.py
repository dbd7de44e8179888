"""The first page of the data docs: every check with its outcome and offending rows. Needs no network and no script.

Great Expectations' own pages, linked from here, hold each suite in full; their index and style come from the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["SUMMARY", "named", "rank", "write_summary"]

SUMMARY = "summary.html"
_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data quality</title><style>
body{font:15px/1.4 sans-serif;margin:2em} table{border-collapse:collapse} td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;
vertical-align:top} .critical td:first-child{color:#b00;font-weight:bold} .warning td:first-child{color:#b60}
.passed td:first-child{color:#070}
ul{margin:0;padding-left:1.2em}</style></head><body>"""
# Great Expectations' pages show what passed by an icon font from the network.
_STYLE = """<style>body{font-family:sans-serif} td,th{border:1px solid #ccc;padding:.2em .5em;text-align:left}
i.fa-check-circle::before{content:"\\2713";color:#080} i.fa-times::before{content:"\\2717";color:#c00}
i.fa-exclamation-triangle::before{content:"!";color:#c60}</style></body>"""


def write_summary(checks: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """Write the summary into the folder of Great Expectations' pages, and give those a style that needs no network."""
    pages = {page.parts[len(docs.parts) + 1]: page for page in sorted(docs.glob("validations/**/*.html"))}
    for page in docs.rglob("*.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", _STYLE), encoding="utf-8")
    failed = [item for item in checks if not item["passed"]]
    stopped = sum(item["severity"] == "critical" for item in failed)
    title = f"Data quality: {len(checks)} checks, {stopped} critical failed, {len(failed) - stopped} warnings"
    links = " · ".join(f'<a href="{quote(page.relative_to(docs).as_posix())}">{escape(suite)}</a>' for suite, page in pages.items())
    head = "<tr><th>result<th>suite<th>column<th>expectation<th>limit<th>observed<th>first rows</tr>"
    rows = "\n".join(map(_row, sorted(checks, key=rank)))
    text = f"{_HEAD}<h1>{title}</h1><p>Suites in full: {links}</p><table>{head}\n{rows}\n</table></body></html>\n"
    (docs / SUMMARY).write_text(text, encoding="utf-8")


def rank(item: Mapping[str, Any]) -> int:
    """Order checks: critical failures, warnings, passed."""
    return 2 if item["passed"] else 0 if item["severity"] == "critical" else 1


def named(row: Mapping[str, Any]) -> str:
    """Return an offending row in one line: line, id, shortened text; for drift the set, the measure, before and after."""
    return ", ".join(f"{name} {value}" for name, value in row.items())


def _row(item: Mapping[str, Any]) -> str:
    result = "passed" if item["passed"] else item["severity"]
    shown = "".join(f"<li>{escape(named(row))}</li>" for row in item["rows"])
    cells = (result, item["suite"], item["column"], item["expectation"].replace("_", " "), item["limit"], item["observed"])
    return f'<tr class="{result}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + f"<td><ul>{shown}</ul></td></tr>"
