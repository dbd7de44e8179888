"""How a Ray that its own limits keep from starting is known, and how often it is tried. Imports nothing: both environments read it."""

__all__ = ["TOO_SLOW", "TRIES"]

TRIES = 6
TOO_SLOW = "timed out during startup"
"""What Ray says when a node did not start within its own limits."""
