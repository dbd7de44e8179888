"""Debian's nginx with infra/nginx/nginx.conf: the retriever and Prefect's server answer over TLS, to clients that know its certificate."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import require_free
from tasks.local import apps
from tests.infra.engine import check
from tests.knowledge import built, passages, until_ready
from tests.prefect_server import KEY, Server
from tests.waiting import until

pytestmark = pytest.mark.infra
ROWS, TOKEN = 200, "of-the-test"
SEARCH = """
import asyncio, sys
from research_rl.retriever.client import RetrieverClient

async def main():
    async with RetrieverClient(sys.argv[1], sys.argv[2], 60) as client:
        print(await client.search(["where does Person17 Surname17 live?"], 1))

asyncio.run(main())
"""
GET = """
import sys, httpx
from research_rl.process.proxies import httpx_options
print(httpx.get(sys.argv[1], timeout=60, **httpx_options()).status_code)
"""
FLOW = """
from prefect import flow
from prefect.events import emit_event

@flow
def of_the_test():
    emit_event("research.of-the-test", resource={"prefect.resource.id": "research.test"})

of_the_test()
"""


@dataclass(frozen=True)
class Proxy:
    """nginx that runs; `certificate` is what its clients trust."""

    certificate: Path
    ports: Mapping[int, int]

    def url(self, port: int) -> str:
        """Return the address that leads to a service of compose.yaml."""
        return f"https://localhost:{self.ports[port]}"

    def run(
        self, script: str, *arguments: str, known: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client that trusts the certificate, or does not know it."""
        names = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
        names |= {"SSL_CERT_FILE": str(self.certificate)} if known else {}
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env={**names, **(env or {})}, cwd=CHECKOUT, capture_output=True, text=True)


@pytest.fixture(scope="module", name="prefect")
def _prefect(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    server = Server(tmp_path_factory.mktemp("home"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module", name="retriever")
def _retriever(tmp_path_factory: pytest.TempPathFactory) -> Generator[int]:
    workspace, port = tmp_path_factory.mktemp("workspace"), require_free(apps.HOST, 0, "")
    built(workspace, ROWS, encoder={"dim": 128})
    command = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(workspace), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "RESEARCH_RETRIEVER_TOKEN": TOKEN}, cwd=CHECKOUT)
    try:
        until_ready(process, f"http://{apps.HOST}:{port}")
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module", name="proxy")
def _proxy(prefect: Server, retriever: int, tmp_path_factory: pytest.TempPathFactory) -> Generator[Proxy]:
    folder = tmp_path_factory.mktemp("nginx")
    check("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "nginx", cwd=folder)
    (package,) = folder.glob("nginx_*.deb")
    check("dpkg", "-x", str(package), str(folder / "root"))
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    keys = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem"))
    check("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name, *keys)
    (prefect_port,) = re.findall(r":(\d+)/api", prefect.url)
    ports = {port: require_free(apps.HOST, 0, "") for port in (4443, 5443, 8443, 8493)}
    configuration = folder / "nginx.conf"
    configuration.write_text(_adapted(folder, ports, {4200: int(prefect_port), 8080: retriever}))
    # Without a prefix of its own it writes below /usr/share.
    command = [str(folder / "root/usr/sbin/nginx"), "-p", str(folder), "-c", str(configuration), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    try:
        assert until(lambda: all(_listens(port) for port in ports.values()), over=lambda: process.poll() is not None), "nginx did not start"
        yield Proxy(folder / "certificate.pem", ports)
    finally:
        process.terminate()
        process.wait()


def _adapted(folder: Path, listen: Mapping[int, int], upstream: Mapping[int, int]) -> str:
    """Return the file as it is shipped, with the folders and ports of the test."""
    text = (CHECKOUT / "infra/nginx/nginx.conf").read_text()
    for before, after in (("/etc/ssl/research", folder), ("/run", folder), ("/var/log/nginx", folder)):
        assert f"{before}/" in text
        text = text.replace(f"{before}/", f"{after}/")
    for port, own in listen.items():
        text, count = re.subn(rf"listen {port} ssl", f"listen {apps.HOST}:{own} ssl", text)
        assert count == 1
    for port, own in upstream.items():
        text, count = re.subn(rf"{apps.HOST}:{port};", f"{apps.HOST}:{own};", text)
        assert count == 1
    # Folders that Debian's package would make.
    return text.replace("http {", "http {\n" + "".join(f"  {kind}_temp_path {folder}/{kind};\n" for kind in TEMPORARY), 1)


def _listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex((apps.HOST, port)) == 0


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def test_a_training_searches_through_it_and_trusts_no_other_certificate(proxy: Proxy) -> None:
    found = proxy.run(SEARCH, proxy.url(8443), TOKEN)
    assert passages(ROWS)[17]["contents"].splitlines()[1] in found.stdout, found.stderr
    refused = proxy.run(SEARCH, proxy.url(8443), TOKEN, known=False)
    assert "SearchFailure" in refused.stdout, refused.stdout + refused.stderr


def test_the_options_of_every_client_trust_the_certificate_that_the_environment_names(proxy: Proxy) -> None:
    assert proxy.run(GET, f"{proxy.url(8443)}/readyz").stdout.strip() == "200"
    assert "CERTIFICATE_VERIFY_FAILED" in proxy.run(GET, f"{proxy.url(8443)}/readyz", known=False).stderr


def test_a_flow_run_and_its_events_reach_prefect_through_it(proxy: Proxy, prefect: Server, tmp_path: Path) -> None:
    env = {"PREFECT_API_URL": f"{proxy.url(4443)}/api", "PREFECT_API_AUTH_STRING": KEY, "PREFECT_HOME": str(tmp_path)}
    done = proxy.run(FLOW, env={**env, "PREFECT_API_SSL_CERT_FILE": str(proxy.certificate)})
    assert done.returncode == 0, done.stderr[-3000:]
    with prefect.client() as client:
        (run,) = client.read_flow_runs()
        assert run.state_name == "Completed"

        def arrived() -> bool:
            found = client.request("POST", "/events/filter", json={"filter": {"event": {"name": ["research.of-the-test"]}}}).json()
            return found["total"] == 1

        assert until(arrived, over=lambda: prefect.process.poll() is not None, pause_s=1.0)
