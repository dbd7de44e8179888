"""The servers of infra/compose.yaml: they come up, train and answer, and have it all after a restart and a way down and up."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import STAGES, Workspace
from tests.infra import images
from tests.infra.composed import MLFLOW, PREFECT, SERVERS, Client, Composed
from tests.infra.conftest import Bench
from tests.infra.engine import check
from tests.infra.images import PIPELINE, WORKER
from tests.training import SMALLEST
from tests.waiting import until

pytestmark = pytest.mark.infra
DEPLOYED = {item["name"] for item in yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]}
AGENT, PROMETHEUS = "http://127.0.0.1:8090", "http://127.0.0.1:9090"
PAGES = """
import asyncio, sys
from pathlib import Path
from tests.browser import browser

async def main(folder, pages):
    async with browser(folder / "profile") as tab:
        await tab.call("Network.enable")
        for name, address, key, expression in zip(*[iter(pages)] * 4):
            await tab.call("Network.setExtraHTTPHeaders", headers={"Authorization": key} if key else {})
            await tab.open(address, expression)
            await asyncio.sleep(3)
            await tab.picture(folder / f"{name}.png")

asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
"""


def test_everything_is_deployed_and_asks_for_a_key(client: Client) -> None:
    assert set(client.deployments()) == DEPLOYED
    assert client.status(PREFECT, "/api/deployments/count") in (401, 405) and client.status(PREFECT, "/api/work_pools/laptop") == 401
    assert client.status(MLFLOW, "/api/2.0/mlflow/experiments/get?experiment_id=0") == 401
    assert client.status(PREFECT, "/", key=True) == 200, "the page of Prefect's server"
    limits = client.ask(PREFECT, "/api/v2/concurrency_limits/filter", {})
    assert {item["name"] for item in limits} >= {"research-heavy-laptop", "research-heavy-gpu"}
    of_the_night = {"deployments": {"name": {"any_": ["nightly"]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    assert until(lambda: client.ask(PREFECT, "/api/flow_runs/filter", of_the_night), pause_s=5.0), client.composed.logs("prefect")


def test_the_worker_runs_a_deployment_in_the_workspace(client: Client) -> None:
    pool = client.ask(PREFECT, "/api/work_pools/laptop")
    assert pool["status"] == "READY"
    run = client.start("weekly")
    assert until(lambda: client.over(run), pause_s=5.0)
    state = client.run(run)["state"]
    assert state["type"] == "COMPLETED", (state, client.composed.logs("worker"))
    made = {path.name for path in client.composed.workspace.glob("artifacts/*") if (path / "manifest.json").is_file()}
    assert {"validated", "corpus", "index"} <= made


def test_the_worker_trains_to_the_end_and_the_servers_have_it(client: Client) -> None:
    run = client.start("laptop", profile="laptop", overrides=SMALLEST)
    assert until(lambda: client.over(run), pause_s=5.0)
    state = client.run(run)["state"]
    assert state["type"] == "COMPLETED", (state, client.composed.logs("worker"))
    space = Workspace(client.composed.workspace)
    assert [name for name in STAGES if not (space.folder(name) / "manifest.json").is_file()] == []
    (flow,) = client.tracked(prefect_flow_run_id=run)
    assert flow["info"]["status"] == "FINISHED"
    (train,) = client.tracked(**{"mlflow.parentRunId": flow["info"]["run_id"], "mlflow.runName": "train"})
    steps = list(range(1, SMALLEST["train.steps"] + 1))
    assert client.steps(train["info"]["run_id"], "episode/reward") == steps
    assert len(client.artifacts(train["info"]["run_id"], "rollouts")) == len(steps)


def test_a_run_of_the_pool_docker_is_a_container_of_the_image_that_prefect_built(client: Client, tmp_path: Path) -> None:
    """Its image is built and pushed by Prefect's steps; in the workspace it finds everything trained."""
    engine, composed = client.composed.engine, client.composed
    project = yaml.safe_load((CHECKOUT / "infra/prefect/images.yaml").read_text())
    for deployment in project["deployments"]:
        # The layers that stand were built with this network, which is in their keys; here is no other.
        deployment["build"][0]["prefect_docker.deployments.steps.build_docker_image"]["network"] = "host"
    (file := tmp_path / "images.yaml").write_text(yaml.safe_dump(project))
    key = composed.secrets["PREFECT_KEY"]
    env = {**engine.env, "PREFECT_API_URL": f"{PREFECT}/api", "PREFECT_API_AUTH_STRING": key, "PREFECT_HOME": str(tmp_path)}

    def prefect(*words: str) -> str:
        return check(*engine.entered([str(Path(sys.executable).parent / "prefect"), "--no-prompt", *words]), cwd=CHECKOUT, env=env)

    with engine.registry(5001) as registry:
        env |= {"WORKER_IMAGE": f"{registry}/research-rl/worker", "WORKER_TAG": "test"}
        prefect("deploy", "--name", "docker", "--prefect-file", str(file))
        assert client.ask(f"http://{registry}", "/v2/research-rl/worker/tags/list")["tags"] == ["test"]
    secret = (
        f"from prefect.blocks.system import Secret; Secret(value={composed.secrets['MLFLOW_PASSWORD']!r}).save('mlflow', overwrite=True)"
    )
    check(*engine.entered([sys.executable, "-c", secret]), env=env)
    tracking = {"URI": "http://mlflow:5000", "USERNAME": "research", "PASSWORD": "{{ prefect.blocks.secret.mlflow }}"}
    variables = {
        "volumes": [f"{composed.workspace}:/workspace"],
        "env": {f"MLFLOW_TRACKING_{name}": value for name, value in tracking.items()},
    }
    run = client.start("docker", variables, profile="laptop", overrides=SMALLEST)
    printed = prefect("worker", "start", "--pool", "docker", "--run-once")
    ended = client.run(run)
    assert ended["state"]["type"] == "COMPLETED", (ended["state"], printed)
    assert re.fullmatch(r"http\+docker://localhost:[0-9a-f]{64}", ended["infrastructure_pid"]), ended["infrastructure_pid"]
    states = {task["state_name"] for task in client.ask(PREFECT, "/api/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})}
    assert "Cached" in states and states <= {"Cached", "Completed"}
    (flow,) = client.tracked(prefect_flow_run_id=run)
    assert flow["info"]["status"] == "FINISHED"
    composed.engine.docker("image", "rm", f"{env['WORKER_IMAGE']}:test")


def test_the_retriever_and_the_agent_serve_what_was_trained(client: Client) -> None:
    composed = client.composed
    composed.up("retriever", "agent", "prometheus", "alertmanager")
    assert client.status(AGENT, "/v1/models") == 401
    body = {"model": "research-agent", "input": "Where was the author of the oldest book born?"}
    answer = client.ask(AGENT, "/v1/responses", body, f"Bearer {composed.secrets['RESEARCH_AGENT_TOKEN']}")
    assert answer["status"] in ("completed", "incomplete") and answer["output"]


def test_prometheus_reaches_all_and_answers_what_the_dashboards_ask(client: Client) -> None:
    def up() -> bool:
        found = client.ask(PROMETHEUS, "/api/v1/targets")["data"]["activeTargets"]
        return {item["labels"]["job"] for item in found if item["health"] == "up"} == {"retriever", "agent", "training"}

    def rows(expression: str) -> list[dict[str, Any]]:
        return client.ask(PROMETHEUS, f"/api/v1/query?{urlencode({'query': expression})}")["data"]["result"]

    assert until(up, pause_s=5.0), client.ask(PROMETHEUS, "/api/v1/targets")
    groups = client.ask(PROMETHEUS, "/api/v1/rules")["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"} and len(groups) == 3
    (receiver,) = client.ask(PROMETHEUS, "/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    assert receiver["url"].startswith("http://alertmanager:9093/")
    boards = [json.loads(path.read_text()) for path in sorted((CHECKOUT / "infra/monitoring/dashboards").glob("*.json"))]
    asked = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]

    def shown() -> bool:
        # A rate needs two scrapes, and what was refused is shown where something was.
        assert client.status(AGENT, "/v1/models") == 401
        return all(rows(expression) for expression in asked)

    assert until(shown, pause_s=10.0), [item for item in asked if not rows(item)]
    (refusals,) = {expression for expression in asked if expression.endswith("> 0")}
    assert {row["metric"]["reason"] for row in rows(refusals)} == {"token"}
    client.composed.compose("stop", "agent", "retriever", "prometheus", "alertmanager")


def test_the_pages_show_the_training(client: Client) -> None:
    """Pictures stay in the engine's folder where it is kept."""
    (experiment,) = {item["info"]["experiment_id"] for item in client.tracked(profile="laptop")}
    pages = [
        *("prefect", f"{PREFECT}/runs", client.keys[PREFECT], "document.body.innerText.includes('research-train')"),
        *("mlflow", f"{MLFLOW}/#/experiments/{experiment}/runs", client.keys[MLFLOW], "document.body.innerText.includes('train laptop')"),
    ]
    folder = client.composed.engine.folder / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    client.composed.engine.inside("env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-c", PAGES, str(folder), *pages)
    assert {path.stem for path in folder.glob("*.png") if path.stat().st_size > 20_000} == {"prefect", "mlflow"}


def test_what_was_made_is_there_after_a_restart_and_after_down_and_up(client: Client) -> None:
    before, automations, composed = client.deployments(), client.automations(), client.composed
    made = client.ask(MLFLOW, "/api/2.0/mlflow/experiments/create", {"name": "kept"})["experiment_id"]
    runs = sorted(item["info"]["run_id"] for item in client.tracked())
    (train,) = client.tracked(**{"mlflow.runName": "train"})
    rollouts = client.artifacts(train["info"]["run_id"], "rollouts")
    composed.compose("restart", "prefect", "mlflow", "postgres", "s3")
    composed.up(*SERVERS)
    assert client.deployments() == before
    composed.compose("down")
    assert composed.compose("ps", "--all", "--quiet") == ""
    composed.up(*SERVERS)
    assert client.deployments() == before
    assert client.ask(MLFLOW, f"/api/2.0/mlflow/experiments/get?experiment_id={made}")["experiment"]["name"] == "kept"
    assert sorted(item["info"]["run_id"] for item in client.tracked()) == runs
    assert client.artifacts(train["info"]["run_id"], "rollouts") == rollouts != []
    # The bootstrap ran again at each start, and made none a second time.
    assert client.automations() == automations and "A run is silent" in automations


def test_a_worker_that_is_stopped_ends_without_force(client: Client) -> None:
    client.composed.compose("stop", "worker")
    state = json.loads(client.composed.engine.docker("inspect", "--format", "{{json .State}}", client.composed.container("worker")))
    assert state["ExitCode"] in (0, 143)


@pytest.mark.parametrize("image", [PIPELINE, WORKER], ids=["pipeline", "worker"])
def test_no_layer_has_a_secret_of_the_checkout_or_the_address_of_a_package_index(
    image: images.Image, composed: Composed, bench: Bench
) -> None:
    assert images.leaks(composed.engine, image, [bench.secret, *bench.mirror.private]) == []
