"""The first page of the data docs: every check with its outcome and offending rows. Needs no network and no script.

Great Expectations' own pages, linked from here, hold each suite in full; their index and style come from the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from research_rl.report import html
from research_rl.report.html import ColouredCell
from research_rl.terminal import printable

__all__ = ["SUMMARY", "named", "rank", "write_summary"]

SUMMARY = "summary.html"
_INDEX = "index.html"
_TEMPLATES = Path(__file__).parent / "templates"
_KINDS = {"passed": "good", "critical": "bad", "warning": "warning"}
# Without a script, and where there is no network without its fonts, a page of Great Expectations still shows what passed.
_HEAD = """<head>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline' https:; font-src https: data:; img-src data: https://greatexpectations.io">
<style>body{font-family:sans-serif} td,th{border:1px solid #ccc;padding:.2em .5em;text-align:left}
i.fa-check-circle::before{content:"\\2713";color:#080} i.fa-times::before{content:"\\2717";color:#c00}
i.fa-exclamation-triangle::before{content:"!";color:#c60}</style>"""


def write_summary(checks: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """Write the summary into the folder of Great Expectations' pages, in place of their index too, which needs the network.

    Those pages get a style that needs no network and a policy that lets no script run.
    """
    # The folder below `validations` has the name of the suite.
    pages = {page.parts[len(docs.parts) + 1]: page for page in sorted(docs.glob("validations/**/*.html"))}
    for page in docs.rglob("*.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("<head>", _HEAD, 1), encoding="utf-8")
    failed = [check for check in checks if not check["passed"]]
    stopped = sum(check["severity"] == "critical" for check in failed)
    text = html.render(
        "quality.html.j2",
        f"Data quality: {len(checks)} checks, {stopped} critical failed, {len(failed) - stopped} warnings",
        folder=_TEMPLATES,
        suites=[(suite, quote(page.relative_to(docs).as_posix())) for suite, page in pages.items()],
        rows=[_row(check) for check in sorted(checks, key=rank)],
    )
    for name in (SUMMARY, _INDEX):
        (docs / name).write_text(text, encoding="utf-8")


def rank(item: Mapping[str, Any]) -> int:
    """Order checks: critical failures, warnings, passed."""
    return 2 if item["passed"] else 0 if item["severity"] == "critical" else 1


def named(row: Mapping[str, Any]) -> str:
    """Return an offending row in one line that is safe to print: line, id, shortened text; for drift what moved, before and after."""
    return printable(", ".join(f"{name} {value}" for name, value in row.items()))


def _row(item: Mapping[str, Any]) -> list[str | ColouredCell]:
    result = "passed" if item["passed"] else item["severity"]
    shown = "\n".join(map(named, item["rows"]))
    expectation = item["expectation"].removeprefix("expect_").replace("_", " ")
    return [ColouredCell(result, _KINDS[result]), item["suite"], item["column"], expectation, item["limit"], item["observed"], shown]
