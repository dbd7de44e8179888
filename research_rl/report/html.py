"""Build pages that carry everything they need. Knows escaping, tables and the look; knows no metric.

Invariants: (1) every text is escaped, passages are untrusted; (2) a page loads nothing from elsewhere, and its content
security policy forbids it to.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["Html", "data_block", "figure", "heading", "page", "paragraph", "table"]

_STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Html:
    """Markup that is safe as it stands; plain strings are escaped instead."""

    text: str

    def __add__(self, other: Html) -> Html:
        return Html(self.text + "\n" + other.text)


def page(title: str, body: Html, script: str = "") -> str:
    """Return a whole document; `script` runs after the body and is the only one allowed to."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n{body.text}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> Html:
    """Return a heading."""
    return Html(f"<h{level}>{escape(text)}</h{level}>")


def paragraph(text: str | Html, kind: str = "") -> Html:
    """Return a paragraph of class `kind`."""
    return Html(f'<p class="{escape(kind)}">{_inline(text)}</p>')


def table(head: Sequence[str], rows: Sequence[Sequence[str | Html]]) -> Html:
    """Return a table; the first column is text, the others are numbers."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        "<tr>" + f'<th scope="row">{_inline(row[0])}</th>' + "".join(f"<td>{_inline(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return Html(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>')


def figure(png: bytes, description: str) -> Html:
    """Return an image that is part of the page."""
    return Html(f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def data_block(name: str, content: Any) -> Html:
    """Return `content` as JSON for the page's script; no text in it can end the block or begin markup."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _inline(content: str | Html) -> str:
    return content.text if isinstance(content, Html) else escape(content)
