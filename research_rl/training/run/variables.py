"""Environment variables by which the supervisor tells verl's processes what they cannot be told otherwise. Names alone."""

__all__ = ["ENGINE_THREADS_VARIABLE", "TOKEN_VARIABLE"]

ENGINE_THREADS_VARIABLE = "RESEARCH_ENGINE_THREADS"
"""Threads of the CPU rollout engine's forward pass."""
TOKEN_VARIABLE = "RESEARCH_TRAIN_TOKEN"
"""This attempt's secret, which keeps the sockets of two trainings on one machine apart."""
