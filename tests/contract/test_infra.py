"""Every file under infra/ is what its tool accepts, and its numbers and names fit the code. No image is built here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from research_rl.config import RetrieverConfig
from research_rl.paths import CHECKOUT
from research_rl.retriever import TOKEN
from research_rl.retriever.observe import Metrics
from tasks.local import kubernetes
from tests.knowledge import built

INFRA = CHECKOUT / "infra"
BIN = Path(sys.executable).parent


def check(*command: str) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", [INFRA / "docker" / f"{name}.Dockerfile" for name in ("retriever", "pipeline")], ids=["retriever", "pipeline"]
)
def test_dockerfiles_are_clean_pinned_and_without_root(path: Path) -> None:
    check("hadolint", str(path))
    text = path.read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+\S*$", text, re.M) and "latest" not in text
    assert re.search(r"^USER 10001$", text, re.M) and "HEALTHCHECK" in text
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", text, re.M)
    assert all((CHECKOUT / name).exists() for line in copied for name in line.split())


def test_compose_fits_its_schema_and_publishes_on_loopback_alone() -> None:
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml"))
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    assert {"prefect", "worker", "mlflow", "s3", "retriever"} <= set(services)
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert all("build" in service or ":" in service["image"] for service in services.values())
    built_files = [service["build"]["dockerfile"] for service in services.values() if "build" in service]
    assert all((CHECKOUT / name).is_file() for name in built_files)


def test_prefect_in_compose_asks_for_a_key_that_is_in_no_file_and_answers_no_foreign_page() -> None:
    """Without a key any page in the user's browser could start a deployment with a command of its own, which the worker would run."""
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    key = services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert re.fullmatch(r"\$\{PREFECT_KEY:\?[^}]+\}", key) and services["worker"]["environment"]["PREFECT_API_AUTH_STRING"] == key
    origins = services["prefect"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert {f"127.0.0.1:{port.split(':')[1]}" for port in services["prefect"]["ports"]} <= {
        item.removeprefix("http://") for item in origins
    }
    assert "*" not in origins


def test_kubernetes_manifests_fit_their_schemas_and_the_service() -> None:
    check("kubernetes-validate", "-k", "1.31", "--strict", str(INFRA / "k8s" / "retriever.yaml"))
    documents = {item["kind"]: item for item in yaml.safe_load_all((INFRA / "k8s" / "retriever.yaml").read_text())}
    spec = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")] == [
        "/readyz",
        "/readyz",
        "/health",
    ]
    assert container["env"][0]["name"] == TOKEN
    assert spec["terminationGracePeriodSeconds"] > 5 + RetrieverConfig().drain_s


@pytest.mark.parametrize("parts", [1, 2])
def test_rendered_manifests_ask_for_the_memory_of_what_is_served(tmp_path: Path, parts: int) -> None:
    workspace = built(tmp_path, 200, encoder={"dim": 64})
    text = kubernetes.rendered(workspace, "registry.example/retriever:1", parts)
    (tmp_path / "k8s.yaml").write_text(text)
    check("kubernetes-validate", "-k", "1.31", "--strict", str(tmp_path / "k8s.yaml"))
    deployments = [item for item in yaml.safe_load_all(text) if item["kind"] == "Deployment"]
    containers = [item["spec"]["template"]["spec"]["containers"][0] for item in deployments]
    assert [item["resources"]["requests"]["memory"] for item in containers] == [f"{kubernetes.memory_mib(workspace, parts)}Mi"] * parts
    assert {item["image"] for item in containers} == {"registry.example/retriever:1"}
    assert [item.get("args") for item in containers] == ([None] if parts == 1 else [["--part", "1/2"], ["--part", "2/2"]])
    services = [item for item in yaml.safe_load_all(text) if item["kind"] == "Service"]
    for deployment, service in zip(deployments, services, strict=True):
        assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_monitoring_asks_only_for_metrics_that_exist() -> None:
    text = Metrics(lambda: 0, lambda: 0, lambda: 0)
    text.refused("full")
    known = {line.split()[2] for line in text.text().decode().splitlines() if line.startswith("# TYPE")}
    rules = yaml.safe_load((INFRA / "monitoring" / "alerts.yml").read_text())["groups"][0]["rules"]
    board = json.loads((INFRA / "monitoring" / "retriever-dashboard.json").read_text())
    asked = " ".join([rule["expr"] for rule in rules] + [target["expr"] for panel in board["panels"] for target in panel["targets"]])
    names = {re.sub("_bucket$", "", name) for name in re.findall(r"retriever_\w+", asked)}
    assert len(names) >= 8 and names <= known, names - known
    assert yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())["scrape_configs"][0]["authorization"]["type"] == "Bearer"
