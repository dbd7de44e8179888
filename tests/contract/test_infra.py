"""Every file under infra/ is what its tool accepts, and its numbers and names fit the code. No image is built here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from research_rl.config import RetrieverConfig
from research_rl.paths import CHECKOUT
from research_rl.retriever import TOKEN
from research_rl.training.run.metrics_log import MetricsLog
from tasks.local import compose, exporter, kubernetes
from tasks.settings import LEASES
from tests.exposed import agent_metrics, retriever_metrics
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
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.M))
    bases = {base for base in re.findall(r"^FROM (\S+)", text, re.M) if base not in stages}
    assert bases and all(re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", base) for base in bases) and "latest" not in text
    # Each image that is run, not each stage.
    assert text.count("\nUSER 10001\n") == text.count("\nHEALTHCHECK ") == len(re.findall(r"^CMD|^ENTRYPOINT", text, re.M))
    assert text.count("image.revision=${COMMIT}") == text.count("\nUSER 10001\n")


COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_compose_fits_its_schema_and_publishes_on_loopback_alone() -> None:
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml"))
    assert {"postgres", "prefect", "mlflow", "s3", "bootstrap", "worker", "retriever", "agent", "grafana", "alertmanager"} <= set(SERVICES)
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    for build in builds:
        text = (CHECKOUT / build["dockerfile"]).read_text()
        assert "target" not in build or f" AS {build['target']}\n" in text


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_pinned_has_no_rights_and_its_health_check_asks_the_service(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert re.search(r":(v?\d+\.\d+\S*|local)$", service["image"])
    asked = json.dumps(service.get("healthcheck", {})) + (INFRA / "docker/retriever.Dockerfile").read_text() * (name == "retriever")
    asked += (INFRA / "docker/pipeline.Dockerfile").read_text() * (name == "worker")
    assert "http://127.0.0.1:" in asked or "pg_isready" in asked or service["healthcheck"] == {"disable": True}


def test_no_variable_of_compose_is_a_secret_with_a_default_and_no_command_line_holds_one() -> None:
    text = (INFRA / "compose.yaml").read_text()
    for name in re.findall(r"\$\{(\w*(?:KEY|TOKEN|PASSWORD)\w*)", text):
        assert f"${{{name}:?set {name}}}" in text and f"${{{name}:-" not in text
    assert not [name for name, service in SERVICES.items() if "${" in json.dumps(service.get("command", ""))]


def test_what_a_container_writes_lies_in_a_volume_or_in_the_workspace() -> None:
    mounted = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= mounted
    named = {mount["source"] for service in SERVICES.values() for mount in service.get("configs", [])}
    assert named == set(COMPOSE["configs"])


def test_make_compose_up_draws_each_secret_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_KEY", raising=False)
    path = tmp_path / ".env"
    path.write_text("GRAFANA_PASSWORD=chosen\n")
    drawn = compose.write_secrets(path)
    assert {"PREFECT_KEY", "POSTGRES_PASSWORD", "S3_SECRET_KEY"} <= set(drawn) and "GRAFANA_PASSWORD" not in drawn
    first = path.read_text()
    assert first.startswith("GRAFANA_PASSWORD=chosen\n") and path.stat().st_mode & 0o777 == 0o600
    assert re.search(r"^PREFECT_KEY=research:[0-9a-f]{64}$", first, re.M)
    assert compose.write_secrets(path) == [] and path.read_text() == first


def test_prefect_in_compose_asks_for_a_key_that_is_in_no_file_and_answers_no_foreign_page() -> None:
    """Without a key any page in the user's browser could start a deployment with a command of its own, which the worker would run."""
    services = SERVICES
    key = services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert re.fullmatch(r"\$\{PREFECT_KEY:\?[^}]+\}", key) and services["worker"]["environment"]["PREFECT_API_AUTH_STRING"] == key
    origins = services["prefect"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert {f"127.0.0.1:{port.split(':')[1]}" for port in services["prefect"]["ports"]} <= {
        item.removeprefix("http://") for item in origins
    }
    assert "*" not in origins


def test_prefect_keeps_the_same_over_an_outage_in_compose_and_on_a_cluster_as_on_one_machine() -> None:
    deployment = next(part for part in yaml.safe_load_all((INFRA / "k8s/base/prefect.yaml").read_text()) if part["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    on_cluster = {item["name"]: item.get("value") for item in container["env"]}
    for environment in (SERVICES["prefect"]["environment"], on_cluster):
        assert LEASES.items() <= environment.items()


def test_kubernetes_manifests_fit_their_schemas_and_the_service() -> None:
    check("kubernetes-validate", "-k", "1.31", "--strict", str(INFRA / "k8s/base/retriever.yaml"))
    documents = {item["kind"]: item for item in yaml.safe_load_all((INFRA / "k8s/base/retriever.yaml").read_text())}
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


def known_metrics() -> set[str]:
    registry = CollectorRegistry()
    registry.register(exporter.Training(CHECKOUT / "absent"))
    texts = [retriever_metrics().text(), agent_metrics().text()]
    names = {line.split()[2] for text in texts for line in text.decode().splitlines() if line.startswith("# TYPE")}
    return names | {f"training_{name}" for name in (*exporter.SERIES, "step", "running", "silent_seconds")}


def test_monitoring_asks_only_for_metrics_that_exist() -> None:
    rules = [rule for group in yaml.safe_load((INFRA / "monitoring/alerts.yml").read_text())["groups"] for rule in group["rules"]]
    boards = [json.loads(path.read_text()) for path in sorted((INFRA / "monitoring/dashboards").glob("*.json"))]
    assert [board["uid"] for board in boards] == ["research-rl-agent", "research-rl-retriever", "research-rl-training"]
    asked = " ".join(
        [rule["expr"] for rule in rules] + [t["expr"] for board in boards for panel in board["panels"] for t in panel["targets"]]
    )
    names = {re.sub("_bucket$", "", name) for name in re.findall(r"(?:retriever|agent|training)_\w+", asked)}
    assert len(names) >= 25 and names <= known_metrics(), names - known_metrics()
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}


def test_prometheus_asks_services_of_compose_with_their_tokens() -> None:
    jobs = yaml.safe_load((INFRA / "monitoring/prometheus.yml").read_text())["scrape_configs"]
    for job in jobs:
        (target,) = job["static_configs"][0]["targets"]
        assert target.partition(":")[0] in SERVICES
        assert job["authorization"]["credentials_file"] in {mount["target"] for mount in SERVICES["prometheus"]["configs"]}
    receivers = yaml.safe_load((INFRA / "monitoring/alertmanager.yml").read_text())
    assert {route["receiver"] for route in receivers["route"]["routes"]} <= {item["name"] for item in receivers["receivers"]}


def test_a_training_reaches_prometheus(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(exporter.Training(tmp_path))
    assert generate_latest(registry) == b""
    log = MetricsLog(tmp_path / "artifacts/.work/train-1/metrics.jsonl")
    log.path.parent.mkdir(parents=True)
    log.put(1, {"episode/reward": 0.25, "search/paused_s": 4.0, "perf/throughput": 90.0})
    text = generate_latest(registry).decode()
    assert {"training_step 1.0", "training_reward 0.25", "training_paused_seconds 4.0", "training_running 1.0"} <= set(text.splitlines())
