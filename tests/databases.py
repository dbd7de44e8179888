"""Empty databases of Prefect and MLflow. Their migrations take three to eleven CPU-seconds: they run once for all tests."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from research_rl.paths import CHECKOUT

_MADE = CHECKOUT / ".cache/tests"
_BIN = Path(sys.executable).parent


def lay_prefect(path: Path) -> None:
    """Put an empty database of Prefect there."""
    _lay(path, "prefect", ["--no-prompt", "server", "database", "upgrade", "--yes"])


def lay_mlflow(path: Path) -> None:
    """Put an empty database of MLflow there."""
    _lay(path, "mlflow", ["db", "upgrade", "sqlite:///made.db"])


def _lay(path: Path, program: str, upgrade: list[str]) -> None:
    made = _MADE / f"{program}-{version(program)}.db"
    _MADE.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=_MADE) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            own = {"PREFECT_HOME": folder, "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder}/made.db"}
            subprocess.run([str(_BIN / program), *upgrade], check=True, capture_output=True, cwd=folder, env={**os.environ, **own})
            os.replace(Path(folder) / "made.db", made)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, path)
