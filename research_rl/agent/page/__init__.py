"""The page of the agent service: three files of this folder, served as they are. Knows files and headers; knows no question.

The page holds no data: it asks the service like any other client, with the token that its user gives it.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

__all__ = ["PATHS", "add"]

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
PATHS = tuple(_FILES)
# Nothing but the page's own files and the service itself: text of a passage that became markup could load and send nothing.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add(app: FastAPI) -> None:
    """Let `app` serve the page."""
    for path, (name, kind) in _FILES.items():
        _add(app, path, (_FOLDER / name).read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:  # pyright: ignore[reportUnusedFunction]
        """A file of the page."""
        return Response(content, headers={**_HEADERS, "Content-Type": kind})
