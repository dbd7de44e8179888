"""The servers of `make up` and of a run by hand, for real: clients with the key work; foreign pages and everybody else are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import guarded
from tasks.local.stack import Service, Stack

START_S = 600.0
RUN = """
from tasks import settings
settings.apply()
from prefect import flow, task
from tasks.local.server import server
@task
def double(number: int) -> int:
    return 2 * number
@flow
def tiny() -> int:
    return double(21)
url = server()
import httpx
print(httpx.post(url + "/flows/filter", json={}).status_code, tiny())
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESEARCH_PREFECT_PORT", "RESEARCH_MLFLOW_PORT"):
            patch.setenv(name, "0")
        stack._choose()
    return stack


def serve(stack: Stack, service: Service) -> Iterator[str]:
    url = (service.health or "").removesuffix("/health")
    with guarded(service.name, service.command, folder=stack.state, health_url=f"{url}/health", deadline_s=START_S, env=service.env):
        yield url


@pytest.fixture(scope="module")
def prefect(stack: Stack) -> Iterator[str]:
    yield from serve(stack, stack._prefect(stack.addresses()))


@pytest.fixture(scope="module")
def mlflow(stack: Stack) -> Iterator[str]:
    yield from serve(stack, stack._mlflow(stack.addresses()))


def auth(stack: Stack) -> tuple[str, str]:
    user, _, key = stack.variables()["PREFECT_API_AUTH_STRING"].partition(":")
    return user, key


def test_prefect_refuses_pages_of_other_origins_and_requests_without_the_key(stack: Stack, prefect: str) -> None:
    post = partial(httpx.post, f"{prefect}/deployments/filter", trust_env=False, timeout=60)
    json_type = {"Content-Type": "application/json"}
    for headers, status in (
        ({**json_type, "Origin": "https://evil.example"}, 403),
        ({**json_type, "Host": "evil.example"}, 421),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
    ):
        assert post(content=b"{}", headers=headers, auth=auth(stack)).status_code == status, headers
    assert post(json={}).status_code == 401
    assert post(json={}, auth=("research", "wrong")).status_code == 401
    assert post(json={}, auth=auth(stack)).json() == []
    own = prefect.removesuffix("/api")
    assert post(json={}, auth=auth(stack), headers={"Origin": own}).headers["access-control-allow-origin"] == own


def test_mlflow_refuses_pages_of_other_origins_and_requests_without_the_key(stack: Stack, mlflow: str) -> None:
    post = partial(httpx.post, f"{mlflow}/api/2.0/mlflow/experiments/search", trust_env=False, timeout=60)
    variables = stack.variables()
    key = variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]
    assert post(json={"max_results": 1}, auth=key).status_code == 200
    assert post(json={"max_results": 1}).status_code == 401
    assert post(json={"max_results": 1}, auth=key, headers={"Origin": "http://localhost:8000"}).status_code == 403
    assert post(json={"max_results": 1}, auth=key, headers={"Host": "evil.example"}).status_code == 421
    assert post(content=b'{"max_results": 1}', auth=key, headers={"Content-Type": "text/plain"}).status_code == 415


def run(code: str, cwd: Path, **env: str) -> str:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_")) and "PROXY" not in name.upper()
    }
    whole = {**clean, "PYTHONPATH": str(CHECKOUT), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_S), **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.usefixtures("prefect")
def test_the_mlflow_client_and_the_prefect_command_use_the_key(stack: Stack, mlflow: str) -> None:
    variables = {**stack.variables(), "PREFECT_HOME": stack.home}
    assert run("import mlflow; print(mlflow.MlflowClient().create_experiment('x'))", stack.state, **variables).strip().isdigit()
    command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", "work-pool", "ls"]
    assert subprocess.run(command, env={**os.environ, **variables}, cwd=stack.state, capture_output=True).returncode == 0
    assert mlflow


def test_a_run_by_hand_works_behind_a_dead_proxy_and_its_server_asks_for_a_key(tmp_path: Path) -> None:
    shown = run(RUN, tmp_path, PREFECT_HOME=str(tmp_path), HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    assert shown.split() == ["401", "42"]


PAGE = """<title>waits</title><script>
const send = (type, body) =>
  fetch("API/deployments/filter", {method: "POST", mode: "no-cors", headers: type ? {"Content-Type": type} : {}, body});
const read = () => fetch("API/health").then(() => "read", () => "refused");
Promise.all([read(), send("text/plain", "{}"), send("", new Blob(["{}"]))]).then(([answer]) => { document.title = answer; });
</script>"""


class Foreign(BaseHTTPRequestHandler):
    """A web page of another origin that tries to read from Prefect's API and to post to it."""

    api = ""

    def do_GET(self) -> None:
        """Give the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.replace("API", self.api).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_page_of_another_origin_in_a_real_browser_reaches_nothing(stack: Stack, prefect: str, tmp_path: Path) -> None:
    Foreign.api = prefect
    with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom")
        page = f"http://localhost:{site.server_address[1]}/"
        done = subprocess.run(["chromium", *flags, page], capture_output=True, text=True, timeout=START_S)
        site.shutdown()
    assert "<title>refused</title>" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
    refused = (stack.state / "prefect-server.log").read_text()
    assert refused.count("refused POST") >= 2, refused[-2000:]
    assert httpx.post(f"{prefect}/deployments/filter", json={}, auth=auth(stack), trust_env=False, timeout=60).json() == []
