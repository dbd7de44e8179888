"""Every error this project raises on purpose. Knows no other module.

    ResearchError
    ├── ConfigError      (ValueError)        a parameter is unknown or out of range
    ├── DataError        (ValueError)        a corpus or question set breaks its format
    ├── ManifestError    (RuntimeError)      an artifact is missing, torn or does not fit its parents
    ├── StorageError     (RuntimeError)      the disk is full, or a file reached a size limit
    ├── ServiceError     (RuntimeError)      a service did not start, answer or stop in time
    ├── TrainingError    (RuntimeError)      the trainer failed, hung or lost trajectories
    │   └── CollapseError                    the step metrics show a collapse; a rule of `watch` stopped training
    └── ModelError       (ValueError)        a model folder or tokenizer is unusable

A message states the value, the limit and the remedy.
"""

from __future__ import annotations

__all__ = [
    "CollapseError",
    "ConfigError",
    "DataError",
    "ManifestError",
    "ModelError",
    "ResearchError",
    "ServiceError",
    "StorageError",
    "TrainingError",
]


class ResearchError(Exception):
    """Base of all deliberate errors; the command line prints it without a traceback and exits with 1."""


class ConfigError(ResearchError, ValueError):
    """A parameter is unknown, of the wrong type or out of its range."""


class DataError(ResearchError, ValueError):
    """A corpus or question set breaks its format; the message names file, line and value."""


class ManifestError(ResearchError, RuntimeError):
    """An artifact is missing, torn, altered or was built from other parents."""


class StorageError(ResearchError, RuntimeError):
    """The disk is full, or a file reached the process's size limit; what was finished is kept."""


class ServiceError(ResearchError, RuntimeError):
    """A service did not start, answer or stop within its deadline."""


class TrainingError(ResearchError, RuntimeError):
    """The trainer failed, hung past its deadline or lost trajectories."""


class CollapseError(TrainingError):
    """The step metrics show a collapse; the message names rule, value, limit, step, last good checkpoint and remedy."""


class ModelError(ResearchError, ValueError):
    """A model folder or tokenizer is incomplete or does not fit the protocol."""
