"""Ask a command of the checkout, which knows MLflow, and read its answer. Imports nothing of it: an installed wheel has no such commands.

Such a command prints its answer as JSON in the last line of its output. It exits with 1 for what it refuses, with the reason in the last
line of standard error, and with another code when it failed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from research_rl.errors import ConfigError, ServiceError
from research_rl.paths import CHECKOUT, IN_CHECKOUT, PYTHON, python_path

__all__ = ["answer"]

_REFUSED = 1


def answer(module: str, action: str, arguments: Sequence[str], absent: str) -> Any:
    """Return what `python -m module *arguments` answers; `action` names the call in errors.

    Raises ConfigError for what is refused, and with the text `absent` where there is no checkout; ServiceError when the command fails.
    """
    if not IN_CHECKOUT:
        raise ConfigError(absent)
    env = {**os.environ, **python_path(os.environ.get("PYTHONPATH"))}
    command = [PYTHON, "-m", module, *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        # The last line: a library may have printed before.
        return json.loads(done.stdout.strip().splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == _REFUSED:
        raise ConfigError(reason)
    raise ServiceError(f"`python -m {module} {action}` ended with code {done.returncode}: {reason[:800]}")
