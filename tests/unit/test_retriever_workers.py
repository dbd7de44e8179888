"""What several workers stand on: messages, a shared board, forks of one thread, counts that outlive a process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from pydantic import ValidationError

from research_rl.config import RetrieverConfig
from research_rl.errors import ConfigError, ManifestError, ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process import forks
from research_rl.process.board import Board
from research_rl.process.channel import Channel
from research_rl.process.cores import cores, share_cores
from research_rl.process.forks import failed, in_a_thread, raised, require_forks
from research_rl.process.sharing import ProcessShare, SharingServer
from research_rl.retriever.edition import Newer


@pytest.mark.parametrize("workers", [0, 65, 1.5, "many"])
def test_the_number_of_workers_is_bounded(workers: object) -> None:
    with pytest.raises(ValidationError, match="workers"):
        RetrieverConfig.model_validate({"workers": workers})
    assert RetrieverConfig().workers == 1


def test_elsewhere_than_on_linux_several_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_forks("retriever.workers=2")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"retriever.workers=2 needs Linux, .*; set it to 1, or start several services"):
        require_forks("retriever.workers=2")


def test_a_message_comes_whole_with_its_file_and_the_end_is_heard(tmp_path: Path) -> None:
    first, second = Channel.pair()
    with (tmp_path / "file").open("w") as file:
        first.send([file.fileno()], place=3, text="é" * 5000)
    heard = second.receive()
    assert heard is not None
    message, (handle,) = heard
    assert message == {"place": 3, "text": "é" * 4000}
    os.write(handle, b"there")
    os.close(handle)
    assert (tmp_path / "file").read_text() == "there"
    first.close()
    assert second.receive() is None
    second.send(text="nobody hears it")
    second.close()


def test_the_board_shows_those_that_take_connections() -> None:
    board = Board(4)
    assert board.counts() == (0, 0) and board.fewest() == 0
    board.write(0, 7, idle=True)
    board.write(3, 5, idle=False)
    assert board.counts() == (2, 1) and board.fewest() == 5
    if not (pid := os.fork()):
        board.write(1, 2, idle=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert board.counts() == (3, 2) and board.fewest() == 2
    board.leave(1)
    assert board.counts() == (2, 1) and board.fewest() == 5


def test_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    try:
        assert cores() == 8
        for processes, share in ((2, 4), (3, 2), (64, 1)):
            share_cores(processes)
            assert cores() == share
    finally:
        share_cores(1)


def test_an_error_is_the_same_for_the_parent() -> None:
    again = raised(failed(ManifestError("torn")))
    assert isinstance(again, ManifestError) and str(again) == "torn"
    assert str(raised(failed(ValueError("odd")))) == "ValueError: odd" and isinstance(raised(failed(ValueError("odd"))), ServiceError)


def test_what_a_thread_raises_is_raised_here() -> None:
    assert in_a_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ManifestError, match="torn"):
        in_a_thread(lambda: (_ for _ in ()).throw(ManifestError("torn")))


def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_THREADS_END_S", 0.1)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    mine, theirs = Channel.pair()
    try:
        forks.keep(theirs, lambda: "opened", str, lambda *_: None)
    finally:
        over.set()
        thread.join()
    heard = mine.receive()
    assert heard is not None and "threads of libraries go on after opening" in heard[0]["failed"]


def test_forks_hear_no_signal_and_share_what_was_opened() -> None:
    # In a process of its own: this one has threads.
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, cwd=CHECKOUT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["shared", "0", "shared", "1"]


FORKS = """
import os, signal
from research_rl.process.channel import Channel
from research_rl.process.forks import forked, keep

def use(thing, channel, place):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    channel.send(found=thing, place=place)

mine, theirs = Channel.pair()
def run():
    mine.close()
    keep(theirs, lambda: "shared", str, use)
pid = forked(run)
theirs.close()
assert mine.receive()[0] == {"opened": "shared"}
for place in range(2):
    end, other = Channel.pair()
    mine.send([other.fileno()], place=place)
    other.close()
    print(*end.receive()[0].values())
    assert end.receive() is None
mine.close()
assert os.waitpid(pid, 0)[1] == 0
"""


def test_counts_of_processes_that_ended_stay_and_are_counted_once(tmp_path: Path) -> None:
    # The library decides when it is imported whether it counts in files.
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, cwd=CHECKOUT, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


COUNTS = """
import os
from pathlib import Path
from research_rl.process.board import Board
from research_rl.retriever.observe import RetrieverMetrics, Seen
from research_rl.retriever.whole import Whole

folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
whole = Whole(folder, Board(2))

def counted(number, ready):
    metrics = RetrieverMetrics(lambda: 3, lambda: 0, lambda: ready, whole)
    for _ in range(number):
        metrics.request(Seen("/search", queries=2), 200, 0.003)
    metrics.refresh()
    return metrics

def lines():
    return [line for line in whole.text().decode().splitlines() if line.startswith((
        'retriever_requests_total', 'retriever_queries_total', 'retriever_request_seconds_count{route="/search"}',
        'retriever_request_seconds_bucket{le="0.005",route="/search"}', 'retriever_queue_queries', 'retriever_ready'))]

pids = []
for number in (5, 7):
    if not (pid := os.fork()):
        counted(number, 1)
        os._exit(0)
    os.waitpid(pid, 0)
    pids.append(pid)

def expected(queue, ready):
    return sorted([
        'retriever_requests_total{route="/search",status="200"} 12.0', 'retriever_queries_total 24.0',
        'retriever_request_seconds_count{route="/search"} 12.0', 'retriever_request_seconds_bucket{le="0.005",route="/search"} 12.0',
    ] + ([f'retriever_queue_queries {queue}', f'retriever_ready {ready}'] if queue else []))

assert sorted(lines()) == expected(6.0, 1.0), lines()
whole.ended(pids[0])
assert sorted(lines()) == expected(3.0, 1.0), lines()
whole.ended(pids[1])
whole.ended(pids[1])
assert sorted(lines()) == expected(0, 0), lines()
assert sorted(path.name for path in folder.glob("*.db")) == ["counter_0.db", "histogram_0.db"]
"""


def test_an_index_that_could_not_be_opened_is_due_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    newer = Newer(1.0, lambda: "b", lambda: "a")
    assert newer.due() == "b"
    newer.refuse("b", ManifestError("torn"))
    assert newer.due() is None and newer.failed is not None and newer.failed["reason"] == "torn"
    now += 3.0
    assert newer.due() == "b"
    newer.took("b")
    assert newer.due() is None and (newer.switches, newer.failures, newer.failed) == (1, 1, None)


def test_a_port_that_is_taken_is_told_before_anything_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        call = [sys.executable, "-m", "research_rl.retriever.command", "--config", f'{{"port": {port}, "workers": 2}}']
        done = subprocess.run(call, capture_output=True, text=True, cwd=CHECKOUT, timeout=600)
    assert done.returncode == 1 and f"retriever.port={port} on 127.0.0.1 cannot be bound" in done.stderr


def test_a_server_that_makes_room_answers_on_the_connections_that_it_has() -> None:
    mine, theirs = Channel.pair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        share = ProcessShare(listener, Board(1), 0, theirs)
        retired: list[bool] = []
        server = SharingServer(
            uvicorn.Config(_answer, log_level="warning", lifespan="off"),
            share,
            retire=lambda: retired.append(True),
            idle=lambda: True,
            drain=lambda: None,
            active=lambda: 0,
            drain_s=5.0,
        )
        before = signal.getsignal(signal.SIGTERM)

        async def go() -> None:
            running = asyncio.create_task(server.serve())
            assert await asyncio.to_thread(mine.receive) == ({"ready": True}, [])
            assert share.board.counts() == (1, 1) and signal.getsignal(signal.SIGTERM) is before
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in await reader.readline()
            # It takes no more, answers on the connection that it has, and ends with that.
            mine.send(retire=True)
            while not retired:
                await asyncio.sleep(0.01)
            assert share.board.counts() == (0, 0) and not running.done()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).count(b"200 OK") == 1
            writer.close()
            await asyncio.wait_for(running, 600)

        asyncio.run(go())


async def _answer(scope: dict[str, object], receive: object, send: object) -> None:
    assert callable(send)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
