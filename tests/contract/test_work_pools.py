"""The pools whose runs are containers: the workers' own code makes of our templates a container and a pod that may do nothing more."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, get_type_hints
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect_docker.deployments import steps
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from research_rl.paths import CHECKOUT
from tasks.limits import PROJECTS
from tasks.local import pools
from tasks.local.pools import POOLS, TEMPLATES
from tests.prefect_server import harness

COMPOSE = yaml.safe_load((CHECKOUT / "infra/compose.yaml").read_text())
IMAGES = yaml.safe_load((CHECKOUT / "infra/prefect/images.yaml").read_text())
TEMPLATE = next(
    item["spec"]["template"]
    for item in yaml.safe_load_all((CHECKOUT / "infra/k8s/base/worker.yaml").read_text())
    if item["metadata"]["name"] == "worker"
)
WORKER, WORKER_LABELS = TEMPLATE["spec"], TEMPLATE["metadata"]["labels"]


@pytest.fixture(scope="module", name="server")
def _server() -> Generator[None]:
    """The workers' code asks a server for the blocks and variables that a template names."""
    with harness():
        yield


def template(kind: str) -> dict[str, Any]:
    return json.loads(TEMPLATES[kind].read_text())


def pod(tmp_path: Path) -> dict[str, Any]:
    """Return the job that the worker asks the cluster for, which fits Kubernetes' own schema."""
    made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template("kubernetes"), {}))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="run"))
    job = made.job_manifest
    # The validator names what it reads; the cluster makes a name of generateName.
    named = {**job, "metadata": {**job["metadata"], "name": "run"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(named))))
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "-k", "1.31", "--strict", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return job["spec"]["template"]["spec"]


def test_a_template_has_every_variable_of_the_worker_and_no_other() -> None:
    for kind, worker in (("docker", DockerWorker), ("kubernetes", KubernetesWorker)):
        ours, theirs = template(kind), worker.get_default_base_job_template()
        assert ours["variables"]["properties"].keys() == theirs["variables"]["properties"].keys(), kind
        assert ours["job_configuration"].keys() == theirs["job_configuration"].keys(), kind
        assert worker.type == kind == POOLS[kind]


def test_a_pool_is_made_once_and_keeps_what_a_user_set(server: None) -> None:
    projects = [yaml.safe_load(path.read_text()) for path in PROJECTS]
    assert {item["work_pool"]["name"] for project in projects for item in project["deployments"]} == set(POOLS)
    with get_client(sync_client=True) as client:
        assert pools.apply(client) == [f"made: {name}" for name in POOLS]
        client.update_work_pool("docker", WorkPoolUpdate(is_paused=True, concurrency_limit=7, base_job_template=template("kubernetes")))
        assert pools.apply(client) == [f"kept: {name}" for name in POOLS]
        standing = {pool.name: pool for pool in client.read_work_pools()}
    assert {name: pool.type for name, pool in standing.items() if name in POOLS} == POOLS
    docker = standing["docker"]
    assert docker.is_paused and docker.concurrency_limit == 7 and docker.base_job_template == template("docker")


def test_a_container_has_no_rights_and_reaches_the_servers_of_compose(server: None) -> None:
    made = asyncio.run(DockerWorkerJobConfiguration.from_template_and_values(template("docker"), {}))
    service = COMPOSE["services"]["worker"]
    assert made.image == service["image"] and not made.privileged and made.networks == [f"{COMPOSE['name']}_default"]
    assert made.container_create_kwargs is not None
    assert {name: made.container_create_kwargs[name] for name in ("cap_drop", "security_opt", "shm_size", "init")} == {
        name: service[name] for name in ("cap_drop", "security_opt", "shm_size", "init")
    }
    assert made.env["PREFECT_API_URL"] == service["environment"]["PREFECT_API_URL"]


def test_a_pod_is_like_the_workers_own_and_passes_the_restricted_standard(server: None, tmp_path: Path) -> None:
    spec = pod(tmp_path)
    assert spec["securityContext"] == WORKER["securityContext"] and spec["automountServiceAccountToken"] is False
    (container,), (worker,) = spec["containers"], WORKER["containers"]
    for name in ("securityContext", "resources", "image", "envFrom", "volumeMounts"):
        assert container[name] == worker[name], name
    assert spec["volumes"] == WORKER["volumes"]
    # What the cluster's network rules let in.
    assert WORKER_LABELS.items() <= template("kubernetes")["variables"]["properties"]["labels"]["default"].items()
    named = {item["name"]: item["valueFrom"] for item in container["env"] if "valueFrom" in item}
    assert named == {item["name"]: item["valueFrom"] for item in worker["env"] if "valueFrom" in item}


def test_no_template_holds_a_secret() -> None:
    for kind in TEMPLATES:
        variables = template(kind)["variables"]["properties"]
        assert not [name for name in variables["env"]["default"] if any(word in name for word in ("KEY", "TOKEN", "PASSWORD", "AUTH"))]


def test_the_steps_take_what_the_deployments_give_them() -> None:
    for deployment in IMAGES["deployments"]:
        for part, name in (("build", "build_docker_image"), ("push", "push_docker_image")):
            (step,) = deployment[part]
            given = step[f"prefect_docker.deployments.steps.{name}"]
            inspect.signature(getattr(steps, name)).bind(**{key: value for key, value in given.items() if key not in ("id", "requires")})
        (build,) = deployment["build"]
        # An output of the step's own name would take the place of all outputs that are found below its id.
        made = get_type_hints(steps.build_docker_image)["return"]
        assert build["prefect_docker.deployments.steps.build_docker_image"]["id"] not in made.__annotations__
        dockerfile, target = (build["prefect_docker.deployments.steps.build_docker_image"][key] for key in ("dockerfile", "target"))
        assert f" AS {target}\n" in (CHECKOUT / dockerfile).read_text()
        path, _, function = deployment["entrypoint"].partition(":")
        assert f"def {function}(" in (CHECKOUT / path).read_text()
