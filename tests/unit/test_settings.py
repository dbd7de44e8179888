"""Commands typed in the checkout find the server of `make up`; importing a flow asks no server and changes no file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import reap, spawn
from tasks import settings
from tasks.settings import ADDRESSES, KEYS

URL = "http://127.0.0.1:4299/api"
VARIABLES = {"PREFECT_API_URL": URL, "PREFECT_API_AUTH_STRING": "research:k"}


def _seen(folder: Path) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    code = "from prefect.settings import PREFECT_API_URL as u, PREFECT_API_AUTH_STRING as k; print(u.value(), k.value())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True, capture_output=True, text=True).stdout.split()


def test_prefect_reads_address_and_key_in_the_checkout_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    settings.point_prefect_at(tmp_path, VARIABLES)
    assert (tmp_path / "prefect.toml").stat().st_mode & 0o777 == 0o600
    assert _seen(tmp_path) == [URL, "research:k"]
    assert _seen(tmp_path / "elsewhere") == ["None", "None"]


def test_a_file_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text("[api]\n")
    settings.point_prefect_away(tmp_path)
    assert (tmp_path / "prefect.toml").exists()


def test_setting_the_environment_asks_no_server_and_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers stands for one that is busy; it must not be waited for, nor forgotten."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        settings.point_prefect_at(tmp_path, {**VARIABLES, "PREFECT_API_URL": url})
        settings.stack_folder(tmp_path).mkdir(parents=True)
        (settings.stack_folder(tmp_path) / ADDRESSES).write_text(json.dumps({"PREFECT_API_URL": url}))
        settings.apply(tmp_path)
        with socket.create_connection(listener.getsockname()) as own:
            accepted, first = listener.accept()
            accepted.close()
            assert first == own.getsockname(), "connections are taken in order: an earlier one would come first"
    assert (tmp_path / "prefect.toml").exists() and "PREFECT_API_URL" not in os.environ


def test_only_a_server_whose_process_runs_counts_as_running(tmp_path: Path) -> None:
    folder = settings.stack_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / ADDRESSES).write_text(json.dumps({"PREFECT_API_URL": URL, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}))
    assert settings.running(tmp_path) == {}
    spawn("prefect-server", ["sleep", "60"], folder=folder, detached=True)
    try:
        assert settings.running(tmp_path) == {"PREFECT_API_URL": URL}
    finally:
        assert reap(folder) == ["prefect-server"]


def test_keys_are_drawn_once_and_readable_by_their_owner_alone(tmp_path: Path) -> None:
    keys = settings.keys(tmp_path)
    assert len(set(keys.values())) == 3 and min(len(keys["PREFECT_API_AUTH_STRING"]), len(keys["MLFLOW_TRACKING_PASSWORD"])) > 32
    assert settings.keys(tmp_path) == keys
    assert (settings.stack_folder(tmp_path) / KEYS).stat().st_mode & 0o777 == 0o600


def test_the_key_of_mlflow_is_given_to_its_own_server_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    keys = settings.keys(tmp_path)
    (settings.stack_folder(tmp_path) / ADDRESSES).write_text('{"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}')
    settings.sign_in("http://127.0.0.1:5000/", tmp_path)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == keys["MLFLOW_TRACKING_PASSWORD"]
    settings.sign_in("https://mlflow.example", tmp_path)
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


def _server(url: str) -> subprocess.CompletedProcess[str]:
    code = """
from tasks import settings
settings.apply()
from research_rl.errors import ServiceError
from tasks.local.server import server
try:
    server()
except ServiceError as error:
    print(error)
"""
    env = {**os.environ, "PREFECT_API_URL": url}
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, env=env, capture_output=True, text=True, check=True)


def test_a_configured_server_that_is_not_there_is_one_message() -> None:
    assert "PREFECT_API_URL=http://127.0.0.1:9/api does not answer" in (shown := _server("http://127.0.0.1:9/api").stdout)
    assert "unset PREFECT_API_URL" in shown
