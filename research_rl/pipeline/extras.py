"""Which optional library comes with which extra of the wheel. Imports none of them.

A stage imports its libraries when it runs; a missing one then becomes one error that names the extra to install.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager

from research_rl.errors import ConfigError

__all__ = ["EXTRAS", "missing_extras", "require"]

EXTRAS: dict[str, str] = {
    "pyarrow": "retrieve",
    "bm25s": "retrieve",
    "Stemmer": "retrieve",
    "faiss": "retrieve",
    "fastapi": "retrieve",
    "fastapi_offline": "retrieve",
    "h11": "retrieve",
    "prometheus_client": "retrieve",
    "starlette": "retrieve",
    "uvicorn": "retrieve",
    "jinja2": "evaluate",
    "markupsafe": "evaluate",
    "matplotlib": "evaluate",
    "scipy": "evaluate",
    "tokenizers": "evaluate",
    "great_expectations": "validate",
    "pandas": "validate",
    "sentence_transformers": "encode",
    "torch": "encode",
    "transformers": "encode",
    "ray": "ray",
    "huggingface_hub": "hub",
    "boto3": "s3",
    "botocore": "s3",
    "urllib3": "s3",
    "zstandard": "zstd",
}
"""Name under which a library is imported -> extra that installs it."""


@contextmanager
def missing_extras() -> Generator[None]:
    """Turn the failed import of an optional library into a ConfigError that names its extra; other failed imports pass unchanged."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise _missing(library) from error


def require(*libraries: str) -> None:
    """Return when the optional libraries are installed, without importing them; for work that would otherwise notice only at its end.

    Raises ConfigError.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise _missing(library)


def _missing(library: str) -> ConfigError:
    extra = EXTRAS[library]
    return ConfigError(
        f"the library {library} is not installed for {sys.executable}; it comes with the extra {extra}: "
        f"pip install 'research-rl[{extra}]' (in a checkout: make setup)"
    )
