"""What `make up` starts: a server, MLflow and a worker that run a deployment to its end, cancel it cleanly, and go away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Trained, processes_of

from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port
from tasks.local.stack import Stack
from tests.knowledge import built
from tests.waiting import until

PREFECT = str(Path(sys.executable).parent / "prefect")
DEPLOYMENTS = {
    "research-train/laptop",
    "research-train/gpu",
    "research-train/multinode",
    "research-eval/nightly",
    "research-data/weekly",
    "research-serve/retriever",
}


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
    assert [schedule["active"] for name in ("nightly", "weekly") for schedule in schedules[name]] == [False, False]  # type: ignore[index, union-attr]
    assert stack.running() == {"prefect-server", "mlflow-server", "prefect-worker"}
    pids = {path.name: path.read_text() for path in stack.folder.glob("*.pid")}
    stack.up()
    assert {path.name: path.read_text() for path in stack.folder.glob("*.pid")} == pids


def test_a_deployment_runs_through_server_and_worker(stack: Stack, trained: Trained) -> None:
    done = prefect(
        stack, "deployment", "run", "research-train/laptop", "-p", f"workspace={trained.root}", "--watch", "--watch-timeout", "3000"
    )
    assert done.returncode == 0, done.stdout + done.stderr + (stack.folder / "prefect-worker.log").read_text()[-4000:]
    (run,) = api(stack, "flow_runs/filter")
    assert run["state_name"] == "Completed"
    assert run["parameters"]["workspace"] == str(trained.root)  # type: ignore[index]
    names = {str(task["state_name"]) for task in api(stack, "task_runs/filter")}
    assert "Cached" in names and names <= {"Cached", "Completed"}


def test_a_cancelled_run_stops_its_services(stack: Stack, trained: Trained, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained.root, root, ignore=shutil.ignore_patterns(".work", ".dvc", ".services"))
    arguments = ["-p", f"workspace={root}", "-p", 'overrides={"evaluation.rows": 16, "evaluation.seed": 3}']
    assert prefect(stack, "deployment", "run", "research-eval/nightly", *arguments).returncode == 0
    services = root / ".services"
    assert until(lambda: (services / "baseline-model.pid").is_file()), (stack.folder / "prefect-worker.log").read_text()[-4000:]
    run = next(item for item in api(stack, "flow_runs/filter") if item["state_type"] == "RUNNING")
    assert prefect(stack, "flow-run", "cancel", str(run["id"])).returncode == 0
    ended = until(lambda: not list(services.rglob("*.pid")) and not processes_of(root))
    assert ended, [path.name for path in services.rglob("*.pid")] + processes_of(root)
    state = lambda: next(item["state_name"] for item in api(stack, "flow_runs/filter") if item["id"] == run["id"])  # noqa: E731
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
    arguments = ["-p", f"workspace={tmp_path}", "-p", f'overrides={{"retriever.port": {port}}}']
    assert prefect(stack, "deployment", "run", "research-serve/retriever", *arguments).returncode == 0
    url, pid_file = f"http://127.0.0.1:{port}", tmp_path / ".serving" / "retriever.pid"
    log = lambda: (stack.folder / "prefect-worker.log").read_text()[-4000:]  # noqa: E731
    shown = lambda: [item for item in api(stack, "artifacts/filter") if item["key"] == "retriever"]  # noqa: E731
    assert until(lambda: answers(url) and len(shown()) == 1), log()
    (child,) = psutil.Process(json.loads(pid_file.read_text())["pid"]).children()
    child.kill()
    assert until(lambda: not answers(url)) and until(lambda: answers(url) and len(shown()) == 2), log()
    assert all(url in str(item["data"]) for item in shown())
    (run,) = [item for item in api(stack, "flow_runs/filter") if item["state_type"] == "RUNNING"]
    assert prefect(stack, "flow-run", "cancel", str(run["id"])).returncode == 0
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
