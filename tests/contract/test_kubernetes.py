"""The manifests fit one another: every name, port, key and metric that one uses is another's, and no pod has rights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from research_rl.paths import CHECKOUT
from tests.exposed import agent_metrics, retriever_metrics

K8S = CHECKOUT / "infra/k8s"
KUSTOMIZATIONS = {path.parent.relative_to(K8S).as_posix(): yaml.safe_load(path.read_text()) for path in K8S.rglob("kustomization.yaml")}
FILES = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")
ALL = [(path, item) for path in FILES for item in yaml.safe_load_all(path.read_text())]


def kind(name: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for _, item in ALL if item["kind"] == name}


def pods() -> dict[str, dict[str, Any]]:
    """Return the template of each pod, by the name of what makes it."""
    found = {name: item["spec"]["template"] for part in ("Deployment", "Job") for name, item in kind(part).items()}
    cluster = kind("RayJob")["research-train"]["spec"]["rayClusterSpec"]
    return {**found, "ray-head": cluster["headGroupSpec"]["template"], "ray-worker": cluster["workerGroupSpecs"][0]["template"]}


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods().items():
        yield from ((name, container) for container in pod["spec"]["containers"])


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def test_every_file_belongs_to_one_kustomization_and_fits_its_schema() -> None:
    named = {(K8S / folder / item).resolve() for folder, tree in KUSTOMIZATIONS.items() for item in tree["resources"]}
    assert {path for path in named if path.suffix == ".yaml"} == set(FILES)
    assert {path for path in named if path.suffix != ".yaml"} == {K8S / "base"}
    plain = [str(path) for path in FILES if path.name != "rayjob.yaml"]
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "-k", "1.31", "--strict", *plain]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", pods())
def test_a_pod_passes_the_restricted_standard(name: str) -> None:
    spec = pods()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False and not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and "memory" in container["resources"]["limits"]
    assert all(volume.keys() & {"persistentVolumeClaim", "emptyDir", "secret", "configMap"} for volume in spec.get("volumes", []))


def test_no_image_is_whatever_is_newest_and_an_overlay_replaces_what_the_base_has() -> None:
    used = {container["image"] for _, container in containers()}
    assert all(re.fullmatch(r"research-rl/\w+:local", image) for image in used), used
    for folder, tree in KUSTOMIZATIONS.items():
        for image in tree.get("images", []):
            assert any(item.startswith(f"{image['name']}:") for item in used), (folder, image)
            assert image["newTag"] != "latest"
        for patch in tree.get("patches", []):
            assert patch["target"]["name"] in kind(patch["target"]["kind"]), (folder, patch)


def test_an_address_in_a_manifest_is_a_service_with_that_port() -> None:
    services = {name: {port["port"] for port in item["spec"]["ports"]} for name, item in kind("Service").items()}
    found = [match for _, item in ALL for text in texts(item) for match in re.findall(r"http://([a-z0-9-]+):(\d+)", text)]
    # The object store is the cluster's own.
    addresses = {(host, int(port)) for host, port in found if host != "s3"}
    assert {host for host, _ in addresses} == {"prefect", "mlflow", "retriever"}
    assert [address for address in addresses if address[1] not in services.get(address[0], set())] == []
    for name, item in kind("Service").items():
        (pod,) = [pod for pod in pods().values() if item["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        ports = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
        assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports, name


def test_a_secret_that_is_used_is_one_that_the_page_makes_and_stands_in_no_manifest() -> None:
    made: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.+)$", (K8S / "README.md").read_text(), re.M):
        made[name] = {*re.findall(r"--from-literal=([\w-]+)=", rest), *re.findall(r"--from-file=(\S+)", rest)}
    references = [
        (name, item["valueFrom"]["secretKeyRef"])
        for name, container in containers()
        for item in container.get("env", [])
        if "valueFrom" in item
    ]
    assert len(references) > 15
    assert [(name, ref) for name, ref in references if ref["key"] not in made.get(ref["name"], set())] == []
    mounted = [volume["secret"] for pod in pods().values() for volume in pod["spec"].get("volumes", []) if "secret" in volume]
    assert all(item["key"] in made[secret["secretName"]] for secret in mounted for item in secret["items"])
    assert kind("Secret") == {}
    secrets = re.compile(r"TOKEN|PASSWORD|SECRET|AUTH_STRING|CONNECTION_URL|STORE_URI")
    plain = [item["name"] for _, container in containers() for item in container.get("env", []) if "value" in item]
    assert [name for name in plain if secrets.search(name)] == []


def test_claims_and_maps_that_are_used_exist_and_every_mount_has_its_volume() -> None:
    for name, pod in pods().items():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes), name
            assert all(source["configMapRef"]["name"] in kind("ConfigMap") for source in container.get("envFrom", []))
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume}
        assert claims <= set(kind("PersistentVolumeClaim")), name


def test_who_may_ask_is_a_pod_and_what_is_asked_has_that_port() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods().values()]

    def matched(selector: dict[str, Any]) -> list[dict[str, str]]:
        return [item for item in labels if selector.get("matchLabels", {}).items() <= item.items()]

    for name, policy in kind("NetworkPolicy").items():
        assert matched(policy["spec"]["podSelector"]), name
        for rule in policy["spec"].get("ingress", []):
            assert all(matched(peer["podSelector"]) for peer in rule["from"] if "podSelector" in peer), name
    asked = {
        policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name") for policy in kind("NetworkPolicy").values()
    }
    assert set(kind("Service")) <= asked
    closed = kind("NetworkPolicy")["nobody-by-default"]["spec"]
    assert "ingress" not in closed and closed["policyTypes"] == ["Ingress"] and len(matched(closed["podSelector"])) == len(labels)


def test_a_service_scales_by_a_metric_of_its_own_and_keeps_one_replica() -> None:
    texts_of = {
        "retriever": retriever_metrics().text().decode(),
        "agent": agent_metrics().text().decode(),
    }
    assert set(kind("HorizontalPodAutoscaler")) == set(kind("PodDisruptionBudget")) == set(texts_of)
    for name, scaler in kind("HorizontalPodAutoscaler").items():
        assert scaler["spec"]["scaleTargetRef"]["name"] in kind("Deployment")
        (metric,) = scaler["spec"]["metrics"]
        assert f"# TYPE {metric['pods']['metric']['name']} gauge" in texts_of[name]


def test_gpu_pods_go_to_gpu_nodes() -> None:
    spec = pods()["ray-worker"]["spec"]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [item["key"] for item in spec["tolerations"]] == ["nvidia.com/gpu"]


def test_the_agent_can_ask_mlflow_which_model_is_the_champion() -> None:
    [container] = kind("Deployment")["agent"]["spec"]["template"]["spec"]["containers"]
    assert "registry:research-rl@champion" in container["args"]
    assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= {variable["name"] for variable in container["env"]}
    assert "MLFLOW_TRACKING_URI" in kind("ConfigMap")["research-addresses"]["data"]
    senders = kind("NetworkPolicy")["to-mlflow"]["spec"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "agent"}}} in senders
