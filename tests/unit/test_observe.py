"""The first error of a service is an increase that Prometheus sees, and a service says when its index was built anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from research_rl.agent import observe as agent
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.retriever import observe as retriever
from research_rl.retriever.server import another
from tests.exposed import agent_metrics, retriever_metrics

REASON = re.compile(r'(?:refused\(|_away\(|Refused\(\d+, |Refusal\(\d+, )"(\w+)"')
SERVICES = {"retriever": (retriever, ("retriever", "process")), "agent": (agent, ("agent",))}


def text_of(name: str) -> str:
    return {"retriever": retriever_metrics, "agent": agent_metrics}[name]().text().decode()


@pytest.mark.parametrize("name", SERVICES)
def test_every_refusal_is_counted_from_zero(name: str) -> None:
    module, _ = SERVICES[name]
    counted = dict(re.findall(rf'^{name}_refusals_total\{{reason="(\w+)"\}} (\S+)$', text_of(name), re.M))
    assert counted == dict.fromkeys(module.REASONS, "0.0")


@pytest.mark.parametrize("name", SERVICES)
def test_every_reason_in_the_code_is_one_of_them(name: str) -> None:
    module, folders = SERVICES[name]
    files = [path for folder in folders for path in (CHECKOUT / "research_rl" / folder).rglob("*.py")]
    used = {reason for path in files for reason in REASON.findall(path.read_text())} - {"path"}
    assert len(used) > 5 and used <= set(module.REASONS), used - set(module.REASONS)


def test_an_index_that_was_built_anew_is_seen(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)

    def build(content: str) -> str:
        with manifest.publish(workspace.folder("index"), "index", "0" * 64, {}) as staging:
            (staging.path / "part").write_text(content)
        return manifest.load(workspace.folder("index")).hash

    served = build("old")
    metrics = retriever_metrics()
    assert "retriever_index_stale 0.0" in metrics.text().decode()
    metrics.watch_index(lambda: another(workspace, served))
    assert "retriever_index_stale 0.0" in metrics.text().decode()
    build("new")
    assert "retriever_index_stale 1.0" in metrics.text().decode()
