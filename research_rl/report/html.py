"""Render pages that carry everything they need. Knows Jinja, escaping and the look; knows no metric.

Invariants: (1) every text is escaped, passages are untrusted: autoescape is on for every template, and no template uses `safe`;
(2) a page loads nothing from elsewhere, and its content security policy forbids it to.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ColouredCell", "png_address", "render"]

_FOLDER = Path(__file__).parent
_TEMPLATES = _FOLDER / "templates"


@dataclass(frozen=True)
class ColouredCell:
    """A table cell of a class that style.css knows, for example `good` or `bad`."""

    text: str
    kind: str


def render(template: str, title: str, *, folder: Path = _TEMPLATES, script: str = "", **values: Any) -> str:
    """Return a page from a template of `folder`, which may extend and import the templates of this package.

    `script` is trusted; it runs after the body and is the only one allowed to. Raises UndefinedError when the template asks for a
    name that `values` lacks.
    """
    # Not above: modules that other extras of the wheel than `evaluate` bring import this one.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, _TEMPLATES]), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Jinja's tojson still escapes <, > and &, so that data cannot end a script block.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    page = environment.get_template(template)
    return page.render(title=title, policy=_policy(script), style=Markup(style), script=Markup(script), **values) + "\n"


def png_address(png: bytes) -> str:
    """Return an image as an address that holds it, so that it is part of the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    # By its hash, not by 'unsafe-inline': a script that slipped through the escaping would not run.
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}; base-uri 'none'; form-action 'none'"
