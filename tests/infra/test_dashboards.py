"""Debian's Prometheus over what the services export answers every expression of the dashboards, and takes every rule.

Grafana itself is in no package of Debian 12, PyPI or npm.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from collections.abc import Generator
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from research_rl.paths import CHECKOUT
from research_rl.process.services import require_free
from research_rl.training.run.metrics_log import MetricsLog
from tasks.local import apps, exporter
from tests.exposed import agent_metrics, retriever_metrics
from tests.infra.engine import check
from tests.waiting import until

pytestmark = pytest.mark.infra
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHECKOUT / "infra/monitoring/dashboards").glob("*.json"))}
PANELS = [
    (name, panel["title"], target["expr"]) for name, board in BOARDS.items() for panel in board["panels"] for target in panel["targets"]
]
STEP = {metric: 0.5 for metric, _ in exporter.SERIES.values()}


class _Exported(http.server.BaseHTTPRequestHandler):
    """Each service's metrics at a path of its own, as its own code writes them."""

    def __init__(self, texts: dict[str, bytes], *arguments: object) -> None:
        self.texts = texts
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        body = self.texts[self.path.strip("/")]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


def texts(folder: Path) -> dict[str, bytes]:
    log = MetricsLog(folder / "artifacts/.work/train-1/metrics.jsonl")
    log.path.parent.mkdir(parents=True)
    for step in (1, 2):
        log.put(step, STEP)
    registry = CollectorRegistry()
    registry.register(exporter.Training(folder))
    return {"retriever": retriever_metrics().text(), "agent": agent_metrics().text(), "training": generate_latest(registry)}


@pytest.fixture(scope="module", name="prometheus")
def _prometheus(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    check("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "prometheus", cwd=folder)
    (package,) = folder.glob("prometheus_*.deb")
    check("dpkg", "-x", str(package), str(folder / "root"))
    served = http.server.ThreadingHTTPServer((apps.HOST, 0), partial(_Exported, texts(folder / "workspace")))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    target = [{"targets": [f"{apps.HOST}:{served.server_port}"]}]
    jobs = [{"job_name": name, "metrics_path": f"/{name}", "static_configs": target} for name in ("retriever", "agent", "training")]
    rules = str(CHECKOUT / "infra/monitoring/alerts.yml")
    configuration = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [rules], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"{apps.HOST}:{require_free(apps.HOST, 0, '')}"
    flags = (f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
    process = subprocess.Popen([str(folder / "root/usr/bin/prometheus"), "--log.level=warn", *flags])
    try:
        scraped = partial(rows, f"http://{address}", "count(up == 1) == 3 and min(count_over_time(up[1m])) > 5")
        assert until(scraped, over=lambda: process.poll() is not None, pause_s=1.0)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()
        served.shutdown()
        served.server_close()


def rows(prometheus: str, expression: str) -> list[object]:
    """Return the series of an expression. Raises AssertionError with what Prometheus has against it."""
    try:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, trust_env=False, timeout=60)
    except httpx.TransportError:
        return []
    assert answer.status_code in (200, 503), (expression, answer.text)
    return answer.json()["data"]["result"] if answer.is_success else []


@pytest.mark.parametrize(
    ("board", "title", "expression"), PANELS, ids=[f"{board}-{title}-{n}" for n, (board, title, _) in enumerate(PANELS)]
)
def test_prometheus_answers_a_panel(prometheus: str, board: str, title: str, expression: str) -> None:
    # What is asked over time begins with the first request for some of the series.
    assert rows(prometheus, expression) or "rate(" in expression, (board, title)


def test_prometheus_takes_every_rule(prometheus: str) -> None:
    groups = httpx.get(f"{prometheus}/api/v1/rules", trust_env=False, timeout=60).json()["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    wanted = yaml.safe_load((CHECKOUT / "infra/monitoring/alerts.yml").read_text())["groups"]
    assert len(found) == sum(len(group["rules"]) for group in wanted) and not [rule for rule in found if rule["health"] == "err"]
