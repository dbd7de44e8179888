"""Limits on a real server: a place is waited for, and neither a killed holder nor a server killed with it keeps it for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

from research_rl.paths import CHECKOUT
from tasks import limits
from tests.prefect_server import Server
from tests.waiting import until

FLOW = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from prefect import flow, task
from prefect.context import FlowRunContext
from tasks import limits

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

@task
def work():
    # The pool is one that the run of a worker has; this run is started by hand.
    FlowRunContext.get().flow_run.work_pool_name = "laptop"
    with limits.place():
        (folder / "holds").touch()
        time.sleep(seconds)
        (folder / "leaves").touch()

@flow
def holding():
    work()

holding()
"""


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    server = Server(tmp_path_factory.mktemp("home"))
    try:
        with server.client() as client:
            limits.apply(client, ["laptop"])
        yield server
    finally:
        server.kill()


def holder(server: Server, folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Start a run that takes a place, and says so by the file `holds`, and by `leaves` before it gives it back."""
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-c", FLOW, str(folder), str(seconds)]
        return subprocess.Popen(command, env={**server.env, "PYTHONPATH": str(CHECKOUT)}, stdout=log, stderr=log, cwd=folder)


def holds(folder: Path) -> Callable[[], bool]:
    return (folder / "holds").is_file


def test_a_limit_that_a_user_changed_stays(server: Server) -> None:
    name = limits.limit_of("laptop")
    with server.client() as client:
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=3))
        assert limits.apply(client, ["laptop"]) == [f"kept at 3: {name}"]
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=1))
        assert client.read_global_concurrency_limit_by_name(name).limit == 1


def test_a_second_run_waits_for_the_first(server: Server, tmp_path: Path) -> None:
    first = holder(server, tmp_path / "first", 20)
    assert until(holds(tmp_path / "first"), over=lambda: first.poll() is not None), (tmp_path / "first/log").read_text()
    second = holder(server, tmp_path / "second", 0)
    assert first.wait(600) == 0 and second.wait(600) == 0
    left, held = ((tmp_path / name).stat().st_mtime_ns for name in ("first/leaves", "second/holds"))
    assert left < held, "the second held a place while the first one did"


def test_a_killed_run_and_a_server_killed_with_it_keep_no_place(server: Server, tmp_path: Path) -> None:
    dead = holder(server, tmp_path / "dead", 3600)
    assert until(holds(tmp_path / "dead"), over=lambda: dead.poll() is not None), (tmp_path / "dead/log").read_text()
    # Asked of a living holder: by the time that a busy machine has started the server again, the place of a dead one may be free.
    with server.client() as client:
        assert client.read_global_concurrency_limit_by_name(limits.limit_of("laptop")).active_slots == 1
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    server.kill()
    server.start()
    successor = holder(server, tmp_path / "next", 0)
    assert successor.wait(limits.LEASE_S + 300) == 0 and holds(tmp_path / "next")()
