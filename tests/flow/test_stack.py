"""Deployments: `make up` starts a server, MLflow and a worker that run them to their end, cancel them cleanly, and go away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import processes_of

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import free_port
from tasks.local.stack import Stack
from tests.contract import chain_model
from tests.knowledge import built
from tests.training import SMALLEST
from tests.waiting import until

PREFECT = str(Path(sys.executable).parent / "prefect")
DEPLOYMENTS = {
    "research-train/laptop",
    "research-train/gpu",
    "research-train/multinode",
    "research-train/weekly-challenger",
    "research-eval/before-after",
    "research-eval/nightly",
    "research-bench/bench",
    "research-data/weekly",
    "research-serve/retriever",
    "research-serve/agent",
}

DATA = {name: value for name, value in SMALLEST.items() if name.startswith("data.")}
POLICY = {"policy.source": "folder", **{name: value for name, value in SMALLEST.items() if name.startswith(("evaluation.", "episode."))}}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    for name in ("RESEARCH_PREFECT_PORT", "RESEARCH_MLFLOW_PORT"):
        os.environ[name] = "0"
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        for name in ("RESEARCH_PREFECT_PORT", "RESEARCH_MLFLOW_PORT"):
            del os.environ[name]


def prefect(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **stack.variables(), "PREFECT_HOME": stack.home}
    return subprocess.run([PREFECT, "--no-prompt", *arguments], env=env, capture_output=True, text=True, cwd=CHECKOUT)


def api(stack: Stack, path: str, **body: object) -> list[dict[str, object]]:
    variables = stack.variables()
    user, _, key = variables["PREFECT_API_AUTH_STRING"].partition(":")
    url = f"{variables['PREFECT_API_URL']}/{path}"
    return httpx.post(url, json=body, auth=(user, key), timeout=30, trust_env=False).raise_for_status().json()


def test_up_deploys_everything_and_twice_is_once(stack: Stack) -> None:
    flows = {str(flow["id"]): flow["name"] for flow in api(stack, "flows/filter")}
    deployments = api(stack, "deployments/filter")
    assert {f"{flows[str(item['flow_id'])]}/{item['name']}" for item in deployments} == DEPLOYMENTS
    schedules = {str(item["name"]): item["schedules"] for item in deployments}
    scheduled = ("nightly", "weekly", "weekly-challenger")
    assert [schedule["active"] for name in scheduled for schedule in schedules[name]] == [True, False, False]  # type: ignore[index, union-attr]
    assert stack.running() == {"prefect-server", "mlflow-server", "prefect-worker"}
    pids = {path.name: path.read_text() for path in stack.folder.glob("*.pid")}
    stack.up()
    assert {path.name: path.read_text() for path in stack.folder.glob("*.pid")} == pids


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def run(stack: Stack, deployment: str, root: Path, overrides: dict[str, Any], *watching: str) -> None:
    arguments = ["-p", f"workspace={root}", "-p", f"overrides={json.dumps(overrides)}", *watching]
    done = prefect(stack, "deployment", "run", deployment, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr + worker_log(stack)


def worker_log(stack: Stack) -> str:
    return (stack.folder / "prefect-worker.log").read_text()[-4000:]


def task_states(stack: Stack) -> set[str]:
    return {str(task["state_name"]) for task in api(stack, "task_runs/filter")}


def test_a_deployment_runs_through_server_and_worker(stack: Stack, root: Path) -> None:
    run(stack, "research-data/weekly", root, DATA, "--watch", "--watch-timeout", "3000")
    (found,) = api(stack, "flow_runs/filter")
    assert found["state_name"] == "Completed", worker_log(stack)
    assert found["parameters"]["workspace"] == str(root)  # type: ignore[index]
    assert task_states(stack) == {"Completed"}
    assert current("index", config.load(root / "params.yaml"), Workspace(root)) is not None


def test_a_cancelled_run_stops_its_services(stack: Stack, root: Path) -> None:
    folder = chain_model.build(root / "model", {})
    run(stack, "research-train/laptop", root, {**POLICY, "policy.path": str(folder)})
    services = root / ".services"
    assert until(lambda: (services / "baseline-model.pid").is_file()), worker_log(stack)
    assert "Cached" in task_states(stack), "what the other deployment built stands"
    running = next(item for item in api(stack, "flow_runs/filter") if item["state_type"] == "RUNNING")
    assert prefect(stack, "flow-run", "cancel", str(running["id"])).returncode == 0
    ended = until(lambda: not list(services.rglob("*.pid")) and not processes_of(root))
    assert ended, [path.name for path in services.rglob("*.pid")] + processes_of(root)
    state = lambda: next(item["state_name"] for item in api(stack, "flow_runs/filter") if item["id"] == running["id"])  # noqa: E731
    assert until(lambda: state() == "Cancelled"), state()


def answers(url: str) -> bool:
    try:
        reply = httpx.post(f"{url}/search", json={"query": "Person9 Surname9"}, timeout=10, trust_env=False)
        return reply.raise_for_status().json()[0]["id"] == "p9"
    except (httpx.HTTPError, ValueError):
        return False


def test_the_retriever_is_kept_up_until_its_run_is_cancelled(stack: Stack, tmp_path: Path) -> None:
    built(tmp_path, 120, encoder={"dim": 128})
    port = free_port()
    run(stack, "research-serve/retriever", tmp_path, {"retriever.port": port})
    url, pid_file = f"http://127.0.0.1:{port}", tmp_path / ".serving" / "retriever.pid"
    shown = lambda: [item for item in api(stack, "artifacts/filter") if item["key"] == "retriever"]  # noqa: E731
    assert until(lambda: answers(url) and len(shown()) == 1), worker_log(stack)
    (child,) = psutil.Process(json.loads(pid_file.read_text())["pid"]).children()
    child.kill()
    assert until(lambda: not answers(url)) and until(lambda: answers(url) and len(shown()) == 2), worker_log(stack)
    assert all(url in str(item["data"]) for item in shown())
    (serving,) = [item for item in api(stack, "flow_runs/filter") if item["state_type"] == "RUNNING"]
    assert prefect(stack, "flow-run", "cancel", str(serving["id"])).returncode == 0
    assert until(lambda: not pid_file.exists() and not processes_of(tmp_path)), processes_of(tmp_path)
    assert not answers(url)


def test_down_ends_all_of_it(stack: Stack) -> None:
    assert set(stack.down()) == {"prefect-server", "mlflow-server", "prefect-worker"}
    assert stack.running() == set() and stack.addresses() == {}
    left = [process.cmdline() for process in psutil.process_iter() if str(stack.state) in " ".join(safe(process))]
    assert left == []


def safe(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
