"""The page /docs, where the service's requests can be read and tried. Its files are the service's own: it works without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

__all__ = ["OPEN", "documented"]

_FILES = "/docs-files"
OPEN = (
    "/docs",
    "/openapi.json",
    *(f"{_FILES}/{path.name}" for path in (Path(fastapi_offline.__file__).parent / "static").glob("*")),
)
"""Paths that need no token: a browser cannot send one with a page or its files, and they say nothing about what is served."""


def documented(**options: Any) -> FastAPI:
    """Return an application with the page /docs, whose button Authorize takes the service's token."""
    app = FastAPIOffline(docs_url="/docs", redoc_url=None, static_url=_FILES, **options)
    schema = app.openapi

    def openapi() -> dict[str, Any]:
        described = schema()
        described.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
        for operation in (one for path in described["paths"].values() for one in path.values()):
            # The page shows the summary where a request is folded up; by itself it is the name of a function here.
            operation["summary"] = operation.get("description", operation["summary"])
        return described

    app.openapi = openapi
    return app
