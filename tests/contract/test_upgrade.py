"""Databases of earlier releases, made by the servers' own migrations, hold what they held once they are brought to the schema of now."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine

from research_rl.process.services import guarded
from tasks.local.stack import Stack
from tests.waiting import PATIENCE_S

BIN = Path(sys.executable).parent
MLFLOW = "acf3f17fdcc7"
"""MLflow's schema of release 2.10."""
PREFECT = "bb2345678901"
"""Prefect's schema of release 3.4.7, before limits by tag became global ones."""
RUN = "0" * 31 + "1"
RECORDS = f"""
INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage, creation_time, last_update_time)
  VALUES (7, 'research-rl', 'mlflow-artifacts:/7', 'active', 1, 1);
INSERT INTO runs (run_uuid, name, user_id, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id)
  VALUES ('{RUN}', 'train laptop', 'research', 'FINISHED', 1, 2, 'active', 'mlflow-artifacts:/7/{RUN}/artifacts', 7);
INSERT INTO params (key, value, run_uuid) VALUES ('train.steps', '26', '{RUN}');
INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('reward', 0.75, 3, '{RUN}', 26, 0);
INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES ('reward', 0.75, 3, 26, 0, '{RUN}');
INSERT INTO registered_models (name, creation_time, last_updated_time) VALUES ('research-rl', 1, 1);
INSERT INTO model_versions (name, version, creation_time, last_updated_time, current_stage, source, run_id, status)
  VALUES ('research-rl', 1, 1, 1, 'None', 'mlflow-artifacts:/7/{RUN}/artifacts/model', '{RUN}', 'READY');
INSERT INTO registered_model_aliases (name, alias, version) VALUES ('research-rl', 'champion', 1);
"""


def execute(database: Path, script: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.executescript(script)
    connection.close()


def test_runs_models_and_aliases_of_an_earlier_mlflow_are_there_after_db_upgrade(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    engine = create_engine(uri)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(uri)
        config.attributes["connection"] = connection
        command.upgrade(config, MLFLOW)
    engine.dispose()
    execute(database, RECORDS)
    upgrade = subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True)
    assert upgrade.returncode == 0, upgrade.stderr[-2000:]
    client = MlflowClient(uri)
    run = client.get_run(RUN)
    assert (run.data.params, run.data.metrics, run.info.run_name) == ({"train.steps": "26"}, {"reward": 0.75}, "train laptop")
    assert [point.step for point in client.get_metric_history(RUN, "reward")] == [26]
    assert client.get_model_version_by_alias("research-rl", "champion").run_id == RUN


def test_prefects_server_brings_an_earlier_database_to_now_when_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESEARCH_PREFECT_PORT", "0")
    monkeypatch.setenv("RESEARCH_MLFLOW_PORT", "0")
    stack = Stack(tmp_path)
    database = tmp_path / ".prefect/prefect.db"
    database.parent.mkdir()
    env = {**os.environ, "PREFECT_HOME": str(database.parent), "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}"}
    older = [str(BIN / "prefect"), "--no-prompt", "server", "database", "upgrade", "--yes", "--revision", PREFECT]
    made = subprocess.run(older, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    execute(
        database,
        "INSERT INTO flow (name) VALUES ('research-train'); INSERT INTO concurrency_limit (tag, concurrency_limit) VALUES ('gpu', 2);",
    )
    stack._choose()
    service = stack._prefect(stack.addresses())
    url = stack.addresses()["PREFECT_API_URL"]
    user, _, key = stack.variables()["PREFECT_API_AUTH_STRING"].partition(":")
    health = {"folder": tmp_path / "running", "health_url": f"{url}/health", "deadline_s": PATIENCE_S}
    with (
        guarded(service.name, service.command, env=service.env, **health),
        httpx.Client(auth=(user, key), trust_env=False, timeout=120) as http,
    ):  # type: ignore[arg-type]
        assert [flow["name"] for flow in http.post(f"{url}/flows/filter", json={}).json()] == ["research-train"]
        assert http.get(f"{url}/v2/concurrency_limits/tag:gpu").json()["limit"] == 2
