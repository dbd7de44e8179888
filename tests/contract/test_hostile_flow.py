"""Hostile parameters and files through real Prefect flows: one short message without a secret, a failed run, nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client

from flows.data import research_data
from flows.train import research_train
from research_rl.errors import ConfigError, DataError, ResearchError, StorageError
from tests.databases import lay_mlflow
from tests.prefect_server import harness

SECRET = "hunter2"
LONGEST_MESSAGE = 1200
OVERRIDES: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"train.steps": "many"}, "train.steps='many': Input should be a valid integer"),
    # Of 64 bits: Prefect's server keeps what a run was given, and with a larger number in one run it lists none of its runs any more.
    "too large": ({"train.steps": 2**63}, "the limit is 63; choose a smaller one"),
    "no text of a file": ({"data.folder": "a\0b"}, "the character U+0000 at position 1 is in no file name or file; remove it"),
    "a secret": ({"judge.url": f"http://u:{SECRET}@h/v1"}, "judge.url"),
    "too long": ({"tracking.mlflow_uri": "x" * 100_000}, "the limit is 20,000; shorten it"),
    "no section": ({"trian": {"steps": 3}}, "trian is unknown; did you mean 'train'?"),
    "no name": ({"a." * 30: 1}, "a name is section.key"),
    "a value for a section": ({"reward": [1, None]}, "reward=[1, None]"),
}


@pytest.fixture(scope="module", autouse=True)
def server() -> Generator[None]:
    with harness():
        yield


def refused(flow: Any, kind: type[ResearchError], **parameters: Any) -> str:
    """Return the one message with which a run failed; the server keeps the same as the state of the run."""
    with pytest.raises(kind) as caught:
        flow(**parameters)
    with get_client(sync_client=True) as client:
        run = max(client.read_flow_runs(), key=lambda run: str(run.created))
    told = str(caught.value)
    assert run.state_name == "Failed" and run.state and told in str(run.state.message)
    assert len(told) < LONGEST_MESSAGE and "\n" not in told and SECRET not in told, told[:3000]
    return told


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_parameter_of_a_run_is_one_message_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    overrides, says = OVERRIDES[name]
    flow = (research_data, research_train)[list(OVERRIDES).index(name) % 2]
    options = {"dry_run": True} if flow is research_train else {}
    assert says in refused(flow, ConfigError, workspace=str(tmp_path / "w"), overrides=overrides, **options)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("workspace", "kind"), [("a\0b", ConfigError), ("/dev/null/w", StorageError), ("/" + "x" * 300, ConfigError)])
def test_a_workspace_that_no_folder_can_be_is_one_message(workspace: str, kind: type[ResearchError]) -> None:
    refused(research_data, kind, workspace=workspace)


SOURCES = {
    "bombed": ("c.jsonl.gz", gzip.compress(bytes(1 << 24)) * 64, "the line exceeds 16,777,216 bytes"),
    "cut": ("c.jsonl.gz", gzip.compress(os.urandom(4000))[:-9], "is cut off or damaged"),
    "another encoding": ("c.jsonl", '{"id": "1", "contents": "caf\xe9"}'.encode("latin-1"), "is not UTF-8"),
    "empty": ("c.tsv", b"", "holds no row"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_hostile_file_is_one_message_and_no_data_is_published(name: str, tmp_path: Path) -> None:
    file, content, says = SOURCES[name]
    (tmp_path / "s").mkdir()
    lay_mlflow(tmp_path / "w/mlflow.db")
    (tmp_path / "s" / file).write_bytes(content)
    (tmp_path / "s" / "q.jsonl").write_text(json.dumps({"id": "1", "question": "Who?", "golden_answers": ["Ada"]}))
    sets = {f"data.{split}": ["q.jsonl"] for split in ("train", "dev", "test")}
    overrides = {"data.source": "folder", "data.folder": str(tmp_path / "s"), "data.corpus": file, **sets}
    told = refused(research_data, DataError, workspace=str(tmp_path / "w"), overrides=overrides)
    assert says in told and file in told
    assert not (tmp_path / "w" / "data").exists() and not list((tmp_path / "w").glob(".data.*"))
