"""The files of training at scale say what their tools accept: Dockerfiles, the RayJob's pods, the locks, the pools."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from research_rl import config
from research_rl.paths import CHECKOUT

BIN = Path(sys.executable).parent
RAYJOB = CHECKOUT / "infra/k8s/overlays/gpu/rayjob.yaml"
LOCKS = sorted((CHECKOUT / "requirements").glob("gpu-*.txt"))


def pods() -> dict[str, dict[str, Any]]:
    cluster = yaml.safe_load(RAYJOB.read_text())["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }


@pytest.mark.parametrize("name", ["trainer", "server"])
def test_a_dockerfile_is_clean(name: str) -> None:
    done = subprocess.run([BIN / "hadolint", CHECKOUT / f"infra/docker/{name}.Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pods_of_the_rayjob_are_valid(tmp_path: Path) -> None:
    for name, template in pods().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": name}, "spec": template["spec"]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(pod))
    files = sorted(tmp_path.glob("*.yaml"))
    assert [file.stem for file in files] == ["gpu", "head"]
    done = subprocess.run([BIN / "kubernetes-validate", "-k", "1.31", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rayjob_fits_the_profile_and_the_locks() -> None:
    spec = yaml.safe_load(RAYJOB.read_text())["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    trainer = config.load_profile("paper-7b").trainer
    assert workers["replicas"] == trainer.nodes
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == trainer.gpus_per_node
    overrides = [word for word in spec["entrypoint"].split() if "=" in word]
    assert config.load_profile("paper-7b", overrides).cluster.launcher == "ray-job"
    assert spec["rayClusterSpec"]["rayVersion"] in (CHECKOUT / "requirements/gpu-train-vllm.txt").read_text()
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}" in (CHECKOUT / "requirements/policy.txt").read_text()


def test_no_pod_runs_as_root_or_gains_rights() -> None:
    for template in pods().values():
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert all(container["securityContext"]["allowPrivilegeEscalation"] is False for container in template["spec"]["containers"])


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_each_package_once(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s]+", line) for line in lines)
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))


def test_the_locks_agree_on_the_method() -> None:
    for name in ("gpu-train-vllm", "gpu-train-sglang", "gpu-host"):
        assert "verl==0.9.1" in (CHECKOUT / f"requirements/{name}.txt").read_text().splitlines()


def test_every_deployment_has_its_pool() -> None:
    used = {item["work_pool"]["name"] for item in yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]}
    assert used == {"laptop", "gpu", "multinode"}
    assert all(f"`{name}`" in (CHECKOUT / "infra/prefect/README.md").read_text() for name in used)
