"""The retriever: passages for queries over HTTP, and the client that asks for them."""

from __future__ import annotations

__all__ = ["LOOPBACK", "TOKEN"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN = "RESEARCH_RETRIEVER_TOKEN"
"""Environment variable with the service's bearer token; servers and clients alike read it."""
