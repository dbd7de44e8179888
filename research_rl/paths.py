"""Where this project's own files lie: in a checkout, or in the package of an installed wheel. Knows no workspace.

A checkout holds `configs/` beside the package. In a wheel the same files are the package's folder `profiles` (a link in the checkout).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from research_rl.errors import ConfigError

__all__ = [
    "CHECKOUT",
    "IN_CHECKOUT",
    "PROFILES",
    "PYTHON",
    "RUN_FROM",
    "cache_folder",
    "interpreter_path",
    "plain_name",
    "python_path",
    "shipped_file",
]

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent
"""The folder that holds the package. It is a checkout only where IN_CHECKOUT is true; in an installed wheel it is site-packages."""
IN_CHECKOUT = (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "configs").is_dir()
PROFILES = CHECKOUT / "configs" if IN_CHECKOUT else _PACKAGE / "profiles"
RUN_FROM = CHECKOUT if IN_CHECKOUT else Path(sys.prefix)
"""Working folder for `python -m` in another interpreter, which puts that folder on its import path: site-packages must not be it."""
PYTHON = os.path.abspath(sys.executable)
"""This interpreter. Where PATH names its folder relatively, `sys.executable` is relative too, and not found from another working folder."""


def cache_folder() -> Path:
    """Return the folder of downloaded models and measured rates.

    It is $RESEARCH_CACHE where that is set, else `.cache` of the checkout, else `research-rl` in the user's cache folder
    ($XDG_CACHE_HOME or ~/.cache).
    """
    if chosen := os.environ.get("RESEARCH_CACHE"):
        return Path(chosen)
    if IN_CHECKOUT:
        return CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "research-rl"


def python_path(*more: str | None) -> dict[str, str]:
    """Return the variable PYTHONPATH with which another interpreter imports this checkout's code, `more` behind it.

    An installed wheel sets nothing: its site-packages would replace the other interpreter's own libraries, so that one
    needs research-rl installed too.
    """
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), *more]))} if IN_CHECKOUT else {}


def interpreter_path(chosen: str, parameter: str) -> Path:
    """Return the path of an interpreter that `parameter` names, absolute or relative to the checkout; it need not exist here.

    Raises ConfigError for a relative path in an installed wheel, where there is no checkout.
    """
    path = Path(chosen).expanduser()
    if not path.is_absolute() and not IN_CHECKOUT:
        raise ConfigError(
            f"{parameter}={chosen!r} is relative to a checkout, but research-rl runs from {CHECKOUT}, an installed wheel; set {parameter} "
            "to the absolute path of a Python into which `pip install 'research-rl[policy]'` was done (policy-cpu without a GPU)"
        )
    return CHECKOUT / path


def shipped_file(name: str) -> Path:
    """Return the path of a file of the project named as in the checkout, such as `configs/prompts/laptop.txt`; it need not exist."""
    if IN_CHECKOUT:
        return CHECKOUT / name
    return PROFILES / Path(name).relative_to("configs") if Path(name).is_relative_to("configs") else PROFILES / name


def plain_name(text: str) -> str:
    """Return a text as a part of a file's name: letters, digits, dots and underscores, at most 40."""
    return re.sub(r"[^\w.]+", "_", text)[:40]
