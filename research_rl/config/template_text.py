"""The text of a prompt template and its identity. Knows files; knows no model and no configuration class.

The text is read once a process, so that what a run renders and what its hash says are one text even when the file is edited meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from research_rl.errors import ConfigError
from research_rl.paths import shipped_file

__all__ = ["PLACE", "by_content", "template_text"]

PLACE = "{question}"
"""Where a template takes the question; nothing else in it has a meaning."""
_MOST_BYTES = 1 << 20
_SHIPPED = Path(__file__).parents[1] / "episode" / "templates"


@cache
def template_text(template: str, path: str | None) -> str:
    """Return the text of `prompt.template`, exactly as the file holds it. Raises ConfigError for an unusable `prompt.path`."""
    if template != "file":
        # Shipped with the package: the wheel has them without a checkout.
        return _text(_SHIPPED / f"{template}.txt")
    if path is None:
        raise ConfigError(f"prompt.template='file' needs prompt.path; name a text file with one {PLACE}")
    file = shipped_file(str(Path(path).expanduser()))
    if not file.is_file():
        raise ConfigError(
            f"prompt.path={path!r} does not exist (looked in the workspace and for {file}); name a text file with one {PLACE}"
        )
    text = _text(file)
    if text.count(PLACE) != 1:
        raise ConfigError(f"prompt.path={path!r} holds {PLACE} {text.count(PLACE)} times; exactly one is needed")
    return text


def by_content(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `prompt` with the sha256 of its template in the place of the path: what is equal gives equal prompts.

    The hash is None where the file cannot be used: such a section fits no artifact, and building one says what is wrong.
    """
    try:
        text = template_text(prompt["template"], prompt["path"])
    except ConfigError:
        return {**prompt, "path": None, "sha256": None}
    # Where the file lies decides nothing; the same text elsewhere makes the same prompts.
    return {**prompt, "path": None, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _text(file: Path) -> str:
    try:
        # As bytes: read_text would turn \r\n into \n, and the text is taken, and hashed, as it is.
        with file.open("rb") as stream:
            text = stream.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ConfigError(f"{file} has more than {_MOST_BYTES:,} bytes; a prompt template has a few thousand")
        return text.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); name a text file with one {PLACE}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 ({error}); save the prompt template as UTF-8") from None
