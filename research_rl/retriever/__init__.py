"""The retriever: passages for queries over HTTP, and the client that asks for them."""

from __future__ import annotations

from research_rl.process.proxies import LOOPBACK

__all__ = ["LOOPBACK", "TOKEN"]

TOKEN = "RESEARCH_RETRIEVER_TOKEN"
"""Environment variable with the service's bearer token; servers and clients alike read it."""
