"""research-train end to end with every real part: killed in the middle, resumed, recorded everywhere, then skipped.

And by deployment: `make up` starts a server, MLflow and a worker that run it to its end, cancel it cleanly, and go away. Both share one
trained workspace, hence one file: a file runs in one process of the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import SIZE, Trained, processes_of

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.process.services import free_port
from tasks.local.stack import Stack
from tasks.versioning import commit
from tests.knowledge import built
from tests.waiting import until

PREFECT = str(Path(sys.executable).parent / "prefect")
OF_SOME = ("first_answer_search", "searches_after_answer", "redundant_queries")
"""Means over the questions with a query, or whose answer was found: so small a policy may have none before it is trained."""
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


def test_a_deployment_runs_through_server_and_worker(stack: Stack, trained: Trained) -> None:
    done = prefect(
        stack, "deployment", "run", "research-train/laptop", "-p", f"workspace={trained.root}", "--watch", "--watch-timeout", "3000"
    )
    assert done.returncode == 0, done.stdout + done.stderr + (stack.folder / "prefect-worker.log").read_text()[-4000:]
    (run,) = [item for item in api(stack, "flow_runs/filter") if not item["auto_scheduled"]]
    assert run["state_name"] == "Completed"
    assert run["parameters"]["workspace"] == str(trained.root)  # type: ignore[index]
    names = {str(task["state_name"]) for task in api(stack, "task_runs/filter")}
    assert "Cached" in names and names <= {"Cached", "Completed"}


def test_a_cancelled_run_stops_its_services(stack: Stack, trained: Trained, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained.root, root, ignore=shutil.ignore_patterns(".work", ".dvc", ".services"))
    arguments = ["-p", f"workspace={root}", "-p", 'overrides={"evaluation.rows": 16, "evaluation.seed": 3}']
    assert prefect(stack, "deployment", "run", "research-eval/before-after", *arguments).returncode == 0
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


def rows(database: Path, query: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_a_killed_run_leaves_no_process_behind(trained: Trained) -> None:
    assert trained.left_behind == []


def test_the_next_run_goes_on_from_the_last_saved_step(trained: Trained) -> None:
    assert 1 <= trained.steps_at_kill <= SIZE["train.steps"]
    space = Workspace(trained.root)
    lines = [json.loads(line) for line in (space.folder("train") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, SIZE["train.steps"] + 1))
    assert "View at" not in "".join(trained.logs), "the server of a run by hand, and its pages, end with the run"
    skipped = set(re.findall(r"'(\w+)' - Finished in state Cached", trained.logs[1]))
    assert {"policy", "download", "validate", "prepare", "corpus", "embed", "index", "baseline"} <= skipped
    assert not list(space.services.rglob("*.pid")) and processes_of(trained.root, trained.home) == []


def test_every_artifact_stands_and_fits_its_parents(trained: Trained) -> None:
    space, resolved = Workspace(trained.root), config.load(trained.root / "params.yaml")
    assert {name for name in STAGES if current(name, resolved, space) is None} == set()
    assert manifest.load(space.folder("report")).counts["questions"] == SIZE["evaluation.rows"]
    assert (space.folder("report") / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_prefect_shows_states_and_pictures(trained: Trained) -> None:
    database = trained.home / "prefect.db"
    states = {name for (name,) in rows(database, "select state_name from flow_run")}
    assert "Completed" in states
    keys = {key for (key,) in rows(database, "select key from artifact")}
    assert keys >= {
        "data-quality",
        "index-card",
        "baseline-evaluation",
        "evaluate-evaluation",
        "evaluation-report",
        "gate-decision",
        "training-curves",
        "run-summary",
    }
    (picture,) = {data for (data,) in rows(database, "select data from artifact where key = 'training-curves'")}
    assert json.loads(picture).startswith("data:image/png;base64,")
    (report,) = {data for (data,) in rows(database, "select data from artifact where key = 'evaluation-report'")}
    assert "/#/compare-runs?" in json.loads(report)


def test_mlflow_holds_lineage_steps_and_both_evaluations(trained: Trained) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("research-rl").experiment_id])  # type: ignore[union-attr]
    named = {run.info.run_name: run for run in runs if run.info.status == "FINISHED"}
    parents = [run for run in runs if str(run.info.run_name).startswith("train laptop steps=")]
    assert sorted(run.info.status for run in parents) == ["FINISHED", "KILLED"]
    finished = next(run for run in parents if run.info.status == "FINISHED")
    space = Workspace(trained.root)
    for name in STAGES:
        assert finished.data.tags[f"manifest.{name}"] == manifest.load(space.folder(name)).hash
    steps = client.get_metric_history(named["train"].info.run_id, "critic/rewards/mean")
    episodes = client.get_metric_history(named["train"].info.run_id, "episode/reward")
    assert [step.step for step in episodes] == list(range(1, SIZE["train.steps"] + 1))
    # verl logs a step after saving it: a kill between the two leaves that one step with its episodes' metrics only.
    assert len(steps) >= SIZE["train.steps"] - 1 and steps[-1].step == SIZE["train.steps"]
    for part in ("gen", "update_actor", "step"):
        assert len(client.get_metric_history(named["train"].info.run_id, f"timing_s/{part}")) == SIZE["train.steps"]
    before, after = named["baseline"].data.metrics, named["evaluate"].data.metrics
    assert {"em", "f1", "interval/f1_low", "interval/f1_high", "format", "searches"} <= before.keys()
    stated = {stage: json.loads((space.folder(stage) / "metrics.json").read_text()) for stage in ("baseline", "evaluate")}
    missing = {stage: {f"detail/{name}" for name in OF_SOME if name not in metrics} for stage, metrics in stated.items()}
    assert (before.keys() | missing["baseline"]) - {"seconds"} == (after.keys() | missing["evaluate"]) - {"seconds"}
    assert not (missing["baseline"] & before.keys() or missing["evaluate"] & after.keys())
    evaluated = {run.data.tags.get("mlflow.runType") for run in runs if str(run.info.run_name).startswith(("before: ", "after: "))}
    assert evaluated == {"genai_evaluate"}
    assert client.search_traces(locations=[finished.info.experiment_id])


def test_dvc_has_nothing_left_to_do(trained: Trained) -> None:
    assert "up to date" in commit.dvc(trained.root, "status")
    assert "Running stage" not in commit.dvc(trained.root, "repro")


def test_a_third_run_skips_every_stage(trained: Trained) -> None:
    log = trained.run()
    assert set(re.findall(r"'(\w+)' - Finished in state Cached", log)) >= set(STAGES)
    assert trained.seconds[-1] < trained.seconds[0] / 2, "skipping every stage takes less than half of training from the first saved step"


@pytest.mark.parametrize(
    ("argument", "message"),
    [("train.stepz=3", "train.stepz is unknown; did you mean 'steps'?"), ("train", "is not of the form section.key=value")],
)
def test_a_wrong_parameter_is_one_message(trained: Trained, argument: str, message: str) -> None:
    before = (trained.root / "params.yaml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "flows.train", argument], cwd=trained.root, env=trained.env, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert (trained.root / "params.yaml").read_text() == before
