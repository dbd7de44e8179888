"""The servers of `make up` and of a run by hand, for real: clients with the key work; foreign pages and everybody else are refused."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import guarded
from tasks import settings
from tasks.local import sign_in
from tasks.local.stack import LocalService, Stack, _pages
from tests.browser import CHROMIUM, browser
from tests.databases import lay_prefect
from tests.waiting import PATIENCE_S

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
    """The servers' state in a folder as people name them: a database, its address and each command line have to take the name."""
    folder = tmp_path_factory.mktemp("stack") / "Ada's données #1 50%25?x"
    folder.mkdir()
    stack = Stack(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESEARCH_PREFECT_PORT", "RESEARCH_MLFLOW_PORT"):
            patch.setenv(name, "0")
        stack._choose()
    return stack


def serve(stack: Stack, service: LocalService) -> Iterator[str]:
    url = (service.health or "").removesuffix("/health")
    with guarded(service.name, service.command, folder=stack.state, health_url=f"{url}/health", deadline_s=PATIENCE_S, env=service.env):
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
    assert (stack.state / "mlflow.db").is_file() or list(stack.state.glob("*.db")), "a `?` ended the name of the database's folder"
    assert post(json={"max_results": 1}).status_code == 401
    assert post(json={"max_results": 1}, auth=key, headers={"Origin": "http://localhost:8000"}).status_code == 403
    assert post(json={"max_results": 1}, auth=key, headers={"Host": "evil.example"}).status_code == 421
    assert post(content=b'{"max_results": 1}', auth=key, headers={"Content-Type": "text/plain"}).status_code == 415


def run(code: str, cwd: Path, **env: str) -> str:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_")) and "PROXY" not in name.upper()
    }
    whole = {**clean, "PYTHONPATH": str(CHECKOUT), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE_S), **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.usefixtures("prefect")
def test_connections_that_never_finish_their_headers_are_closed(prefect: str, mlflow: str) -> None:
    """1,100 of them used up the open files of a server, which then answered nobody."""
    for url in (prefect, mlflow):
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=60) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
            assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 408"), url


def test_the_mlflow_client_and_the_prefect_command_use_the_key(stack: Stack, mlflow: str) -> None:
    variables = {**stack.variables(), "PREFECT_HOME": stack.home}
    assert run("import mlflow; print(mlflow.MlflowClient().create_experiment('x'))", stack.state, **variables).strip().isdigit()
    command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", "work-pool", "ls"]
    assert subprocess.run(command, env={**os.environ, **variables}, cwd=stack.state, capture_output=True).returncode == 0
    assert mlflow


def test_a_run_by_hand_works_behind_a_dead_proxy_and_its_server_asks_for_a_key(tmp_path: Path) -> None:
    lay_prefect(tmp_path / "prefect.db")
    shown = run(RUN, tmp_path, PREFECT_HOME=str(tmp_path), HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    assert shown.split() == ["401", "42"]


LOST = """
from tasks import settings
settings.apply()
import psutil
from prefect import flow, task
from research_rl.errors import ServiceError
from tasks.local.server import served
@task
def nothing() -> None: ...
@flow
def tiny() -> None:
    nothing()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    nothing()
try:
    with served():
        tiny()
except ServiceError as error:
    print(error)
"""


def test_a_server_that_dies_during_a_run_is_one_message_and_not_waited_for_a_minute_at_each_request(tmp_path: Path) -> None:
    started = time.monotonic()
    lay_prefect(tmp_path / "prefect.db")
    shown = run(LOST, tmp_path, PREFECT_HOME=str(tmp_path), PREFECT_LOGGING_LEVEL="CRITICAL")
    assert re.fullmatch(r"Prefect's server at http://127.0.0.1:\d+/api stopped answering during the run .*goes on where it was\n", shown)
    seconds = time.monotonic() - started
    assert seconds < 300, "Prefect's client alone asks for a minute at each request: 405 s in all"
    print(f"from start to message {seconds:.0f} s")


PAGE = """<title>waits</title><iframe name="frame"></iframe><script>
const address = "API/deployments/DEPLOYMENT/create_flow_run", body = JSON.stringify({job_variables: {command: "touch owned"}});
const send = (mode, type, body) =>
  fetch(address, {method: "POST", mode, headers: type ? {"Content-Type": type} : {}, body, credentials: "include"})
  .then((answer) => answer.type, () => "refused");
const form = document.createElement("form");
Object.assign(form, {method: "POST", enctype: "text/plain", action: address, target: "frame"});
form.append(Object.assign(document.createElement("input"), {name: body.slice(0, -1) + ', "x": "', value: '"}'}));
document.body.append(form);
form.submit();
const socket = new Promise((done) => {
  const opened = new WebSocket("API/events/in".replace("http", "ws"), "prefect");
  opened.onopen = () => done("open");
  opened.onerror = () => done("refused");
});
const read = fetch("API/health").then(() => "read", () => "refused");
const blind = [send("no-cors", "text/plain", body), send("no-cors", "", new Blob([body]))];
Promise.all([send("cors", "application/json", body), ...blind, socket, read])
  .then((answers) => { document.title = answers.join(" "); });
</script>"""


class Foreign(BaseHTTPRequestHandler):
    """A web page of another origin that tries to start a deployment with a command of its own, and to read from Prefect's API."""

    page = ""

    def do_GET(self) -> None:
        """Give the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


def in_browser(profile: Path, address: str, expression: str) -> str:
    """Return the value of an expression on a page once it is true."""

    async def main() -> str:
        async with browser(profile) as tab:
            return await tab.open(address, expression)

    return asyncio.run(main())


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")


@pytest.mark.long
@needs_browser
def test_a_page_of_another_origin_in_a_real_browser_starts_nothing(stack: Stack, prefect: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=prefect, auth=auth(stack), trust_env=False, timeout=60) as client:
        flow = client.post("/flows/", json={"name": "f"}).raise_for_status().json()["id"]
        deployment = client.post("/deployments/", json={"name": "d", "flow_id": flow}).raise_for_status().json()["id"]
        body = {"job_variables": {"command": "touch owned"}}
        client.post(f"/deployments/{deployment}/create_flow_run", json=body).raise_for_status()  # with the key it is a valid request
        Foreign.page = PAGE.replace("API", prefect).replace("DEPLOYMENT", deployment)
        with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as site:
            Thread(target=site.serve_forever, daemon=True).start()
            address = f"http://localhost:{site.server_address[1]}/"
            title = in_browser(tmp_path / "profile", address, "document.title != 'waits' && document.title")
            site.shutdown()
        assert title.split() == ["refused", "opaque", "opaque", "refused", "refused"]
        assert len(client.post("/flow_runs/filter", json={}).json()) == 1
    refused = (stack.state / "prefect-server.log").read_text()
    assert refused.count("refused POST") >= 3 and "refused OPTIONS" in refused and "refused websocket" in refused, refused[-2000:]


@pytest.mark.long
@needs_browser
def test_the_links_that_are_printed_sign_a_browser_in(stack: Stack, prefect: str, mlflow: str, tmp_path: Path) -> None:
    wrong = in_browser(tmp_path / "a", f"{prefect.removesuffix('/api')}/sign-in#research:no", "document.body.innerText.includes('make up')")
    assert wrong
    of_prefect, of_mlflow = sign_in.links(stack.variables())
    shown = in_browser(tmp_path / "b", of_prefect, "/Flow Runs/i.test(document.body.innerText) && location.href")
    assert stack.variables()["PREFECT_API_AUTH_STRING"] not in shown
    shown = in_browser(tmp_path / "c", of_mlflow, "/Recent Experiments/.test(document.body.innerText) && location.href")
    assert shown.startswith(f"{mlflow}/") and "sign-in" not in shown


def test_links_are_printed_to_a_terminal_alone(stack: Stack) -> None:
    variables = stack.variables()
    assert not any(key in " ".join(_pages(variables, private=False)) for key in settings.keys(stack.state).values() if key != "research")
    assert all(key in " ".join(_pages(variables, private=True)) for key in settings.keys(stack.state).values())


def test_signing_in_needs_the_key(stack: Stack, prefect: str, mlflow: str) -> None:
    get = partial(httpx.get, trust_env=False, timeout=60)
    page = get(f"{prefect.removesuffix('/api')}/sign-in")
    assert page.status_code == 200 and auth(stack)[1] not in page.text
    assert get(f"{mlflow}/sign-in").status_code == 401
    user, key = stack.variables()["MLFLOW_TRACKING_USERNAME"], stack.variables()["MLFLOW_TRACKING_PASSWORD"]
    led = get(f"{mlflow}/sign-in", auth=(user, key))
    assert (led.status_code, led.headers["location"]) == (303, f"{mlflow}/")
