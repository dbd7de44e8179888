"""Commands typed in the checkout find the server of `make up`, and only while there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tasks.local import settings


def _seen(folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    code = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_prefect_reads_the_address_in_the_checkout_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    settings.point_prefect_at(tmp_path, "http://127.0.0.1:4299/api")
    assert _seen(tmp_path) == "http://127.0.0.1:4299/api"
    assert _seen(tmp_path / "elsewhere") == "None"


def test_an_address_without_a_server_is_forgotten(tmp_path: Path) -> None:
    settings.point_prefect_at(tmp_path, "http://127.0.0.1:9/api")
    settings.apply(tmp_path)
    assert not (tmp_path / "prefect.toml").exists()


def test_a_file_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text("[api]\n")
    settings.apply(tmp_path)
    assert (tmp_path / "prefect.toml").exists()
