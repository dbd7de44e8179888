"""Services really start, answer, stop, and end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port, free_ports, guarded, reap, require_free, running, spawn
from tests.waiting import PATIENCE_S, ended, until


def _http(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]


def _gone(pid: int) -> bool:
    return until(lambda: ended(pid))


def test_guarded_service_answers_and_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    with guarded("web", _http(port), folder=tmp_path, health_url=f"http://127.0.0.1:{port}/", deadline_s=600) as process:
        child = psutil.Process(process.popen.pid).children()[0].pid
        assert (tmp_path / "web.pid").is_file()
    assert _gone(child)
    assert not (tmp_path / "web.pid").exists()


def test_a_service_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no model here')"]
    with (
        pytest.raises(ServiceError, match=r"(?s)ended with code 1.*no model here"),
        guarded("bad", command, folder=tmp_path, health_url="http://127.0.0.1:9/", deadline_s=600),
    ):
        pass


def test_a_silent_service_is_stopped_at_its_deadline(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceError, match=r"is silent after 0\.5 s"),
        guarded("mute", ["sleep", "60"], folder=tmp_path, health_url="http://127.0.0.1:9/", deadline_s=0.5),
    ):
        pass
    assert reap(tmp_path) == []


def test_killed_parent_takes_daemons_along(tmp_path: Path) -> None:
    """The service forks a daemon in a session of its own; SIGKILL of the parent ends both."""
    daemon = (
        "import os,time,pathlib,sys; os.fork() and os._exit(0); os.setsid(); "
        "path = pathlib.Path(sys.argv[1]); new = path.with_suffix('.new'); new.write_text(str(os.getpid())); new.rename(path); "
        "time.sleep(600)"
    )
    parent = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from research_rl.process.services import spawn
        inner = "import subprocess,sys,time; subprocess.Popen([sys.executable,'-c',sys.argv[1],sys.argv[2]]); time.sleep(600)"
        spawn("svc", [sys.executable, "-c", inner, {daemon!r}, {str(tmp_path / "daemon")!r}], folder=Path({str(tmp_path)!r}))
        time.sleep(600)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "RESEARCH_GRACE_S": "1"})
    assert until((tmp_path / "daemon").is_file)
    pid = int((tmp_path / "daemon").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _gone(pid)


def test_reap_ends_orphans_of_a_killed_guardian(tmp_path: Path) -> None:
    process = spawn("orphan", ["sleep", "600"], folder=tmp_path)
    while not (children := psutil.Process(process.popen.pid).children()):
        time.sleep(0.02)
    child = children[0].pid
    process.popen.kill()
    process.popen.wait()
    assert psutil.pid_exists(child)
    assert reap(tmp_path) == ["orphan"]
    assert _gone(child)


def test_reap_leaves_alone_what_a_living_process_owns(tmp_path: Path) -> None:
    """`research run` in another terminal holds no lock; a flow that opens the same workspace must not end its services."""
    owner = "import sys; from pathlib import Path; from research_rl.process.services import spawn;"
    owner += "spawn('svc', ['sleep', '600'], folder=Path(sys.argv[1])); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", owner, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        assert reap(tmp_path) == [] and running(tmp_path) == {"svc"}
    assert until(lambda: running(tmp_path) == set()), "it ends with its owner"


def test_a_detached_process_has_no_owner_and_is_ended_by_reap(tmp_path: Path) -> None:
    process = spawn("server", ["sleep", "600"], folder=tmp_path, detached=True)
    assert reap(tmp_path) == ["server"]
    assert process.popen.wait(5) is not None and not (tmp_path / "server.pid").exists()


def test_a_clock_that_is_set_changes_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds since 1970 are computed from the time of boot, which moves when the clock is set by 5 s."""
    process = spawn("svc", ["sleep", "600"], folder=tmp_path)
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot - 5)
    try:
        with pytest.raises(ServiceError, match="svc already runs"):
            spawn("svc", ["sleep", "600"], folder=tmp_path)
        assert running(tmp_path) == {"svc"}
    finally:
        process.stop()


@pytest.mark.parametrize("text", ["null", "[]", "7", "{}", '{"pid": 1', ""])
def test_a_torn_pid_file_is_nobodys_process(tmp_path: Path, text: str) -> None:
    (tmp_path / "svc.pid").write_text(text)
    assert running(tmp_path) == set() and reap(tmp_path) == []
    assert not (tmp_path / "svc.pid").exists()


def test_a_service_gets_the_time_it_asked_for_to_end(tmp_path: Path) -> None:
    """A retriever that answers waiting requests for `drain_s` must not be killed before."""
    slow = "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]);"
    slow += "end = lambda *_: (time.sleep(2), (folder / 'done').touch(), sys.exit(3)); signal.signal(signal.SIGTERM, end);"
    slow += "(folder / 'up').touch(); time.sleep(600)"
    for name, grace_s, code in (("patient", 30.0, 3), ("hasty", 0.2, 137)):
        folder = tmp_path / name
        folder.mkdir()
        process = spawn(name, [sys.executable, "-c", slow, str(folder)], folder=folder, grace_s=grace_s)
        while not (folder / "up").exists():
            assert process.poll() is None, process.tail()
            time.sleep(0.02)
        process.stop()
        assert (folder / "done").exists() is (code == 3)


def test_what_is_started_sends_no_loopback_traffic_to_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    port = free_port()
    asks = f"import httpx, time; r = httpx.get('http://127.0.0.1:{port}/'); print('answered', r.status_code, flush=True); time.sleep(600)"
    with guarded("web", _http(port), folder=tmp_path, health_url=f"http://127.0.0.1:{port}/", deadline_s=600):
        client = spawn("client", [sys.executable, "-c", asks], folder=tmp_path)
        while client.poll() is None and "answered 200" not in client.tail():
            time.sleep(0.05)
        assert client.poll() is None, client.tail()
        client.stop()


def test_reap_leaves_a_reused_pid_alone(tmp_path: Path) -> None:
    (tmp_path / "old.pid").write_text(f'{{"pid": {os.getpid()}, "started": 1.0, "marker": "x", "command": []}}')
    assert reap(tmp_path) == []


def test_a_port_in_use_is_named_with_its_setting() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"retriever.port={port} .* set retriever.port to a free port"):
            require_free("127.0.0.1", port, "retriever.port")


def test_free_ports_differ_and_no_connection_takes_one() -> None:
    import socket

    ports, usual = free_ports(50), 32_768
    assert len(set(ports)) == 50 and max(*ports, require_free("127.0.0.1", 0, "retriever.port"), free_port()) < usual, "Linux's first"
    with (
        socket.create_server(("127.0.0.1", ports[0])),
        pytest.raises(ServiceError, match=r"has \d+ free ports from 20000 to 32767, 12768 are"),
    ):
        free_ports(12_768)


_BLIND = """
import os, subprocess, sys
from research_rl.process import _guardian
seen, looks = _guardian.descendants, []
def blind(root):
    looks.append(1)
    return [] if 1 < len(looks) < 4 else seen(root)
_guardian.descendants, _guardian.GRACE_S = blind, 0.3
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
_guardian.end_all()
print(child.pid)
"""


def test_a_reading_of_the_process_table_that_misses_some_ends_nothing_early() -> None:
    """Where pids wrapped round, a child can stand before its parent, and both escape one reading when the parent ends in it."""
    done = subprocess.run([sys.executable, "-c", _BLIND], check=True, timeout=PATIENCE_S, cwd=CHECKOUT, stdout=subprocess.PIPE)
    assert not psutil.pid_exists(int(done.stdout))
