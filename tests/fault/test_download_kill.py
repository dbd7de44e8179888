"""SIGKILL a download at random bytes of the wire and at file operations up to the last one: the next run fetches only the rest.

The long form makes 300 trials of each kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from research_rl.pipeline import manifest
from tests.web import Site, serve, settle

ROWS = 4_000
CORPUS = b"".join(json.dumps({"id": str(n), "contents": f"passage {n} " + "x" * (n % 1197)}).encode() + b"\n" for n in range(ROWS))
QUESTION = b'{"id": "dev_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}}\n'
FILES = {"corpus.jsonl": CORPUS, "dev.jsonl": QUESTION}
TOTAL = sum(map(len, FILES.values()))

# Imports once, then forks for every trial. The forked process may kill itself at the n-th file operation.
RUNNER = """
import json, os, signal, sys
from pathlib import Path
import httpx, numpy
from research_rl.config import Config
from research_rl.data import download
from research_rl.data.sources import http
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.run import run_stage
EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.truncate")
def trial(order):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == order["fatal"]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    named = {split: ["dev.jsonl"] for split in ("train", "dev", "test")}
    tree = {"data": {"source": "http", "url": order["url"], **named}, "transfer": {"piece_mb": 1, "parallel": 3}}
    run_stage("download", Config.model_validate(tree), Workspace(Path(order["root"])))
    os.write(1, b"%d\\n" % seen)
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            trial(json.loads(line))
            code = 0
        finally:
            os._exit(code)
    os.write(1, b"%d\\n" % child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, b"exit %d\\n" % code)
"""


class Runner:
    """Runs downloads in processes that can be killed."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.process = subprocess.Popen([sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, root: Path, fatal: int = 0, started: Callable[[int], None] = lambda pid: None) -> tuple[int, int]:
        """Download into `root`; return the exit code and the number of file operations (0 when killed)."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"root": str(root), "url": self._site.url, "fatal": fatal}) + "\n")
        self.process.stdin.flush()
        numbers: list[int] = []
        for line in self.process.stdout:
            if line.startswith("exit "):
                return int(line.split()[1]), max(numbers[1:], default=0)
            numbers.append(int(line))
            if len(numbers) == 1:
                started(numbers[0])
        raise AssertionError("the runner died")


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site(dict(FILES))) as started:
        yield started


@pytest.fixture
def runner(site: Site) -> Iterator[Runner]:
    made = Runner(site)
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait(10)


def held(root: Path, url: str) -> int:
    """Return the bytes of the source that are on disk."""
    folder = root / "artifacts/.work/download"
    found = 0
    for name, content in FILES.items():
        size = sum(path.stat().st_size for path in folder.glob(f"*-{name}"))
        digest = hashlib.sha256(f"{url}/{name}".encode()).hexdigest()[:16]
        size += sum(p.stat().st_size for p in folder.glob(f".parts/{digest}.*") if p.suffix[1:].isdigit() or p.suffix == ".joined")
        found += min(size, len(content))
    return found


def resume(runner: Runner, site: Site, root: Path) -> None:
    """Run again and check that exactly the rest was asked for, and that what stands is whole and right."""
    settle(site)
    if (root / "data" / manifest.MANIFEST).exists():
        manifest.load(root / "data")
    stood, before = held(root, site.url), site.requested
    published = (root / "data" / manifest.MANIFEST).exists()
    assert runner.run(root)[0] == 0
    assert site.requested - before == (0 if published else TOTAL - stood)
    found = manifest.load(root / "data")
    assert found.facts["source"]["files"]["corpus.jsonl"]["sha256"] == hashlib.sha256(CORPUS).hexdigest()
    assert found.counts == {"corpus": ROWS, "train": 1, "dev": 1, "test": 1}
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def _kill(pid: list[int]) -> None:
    os.kill(pid[0], signal.SIGKILL)


def at_bytes(runner: Runner, site: Site, tmp_path: Path, trials: int) -> None:
    draw = random.Random(11)
    for trial in range(trials):
        root, pid = tmp_path / f"b{trial}", list[int]()
        kill = partial(_kill, pid)
        site.faults["corpus.jsonl"] = deque([("", None)] * draw.randrange(3) + [("call", (draw.randrange(600_000), kill))])
        code, _ = runner.run(root, started=pid.append)
        assert code == -signal.SIGKILL
        site.faults.clear()
        resume(runner, site, root)
        shutil.rmtree(root)


def kill_at(runner: Runner, root: Path, fatal: int) -> None:
    """Kill a run at its file operation number `fatal`, or at one of the few before it where the run was over sooner."""
    # Pieces are fetched at once, so that runs differ by a few operations.
    for operation in range(fatal, max(fatal - 6, 0), -1):
        code, _ = runner.run(root, operation)
        if code == -signal.SIGKILL:
            return
        shutil.rmtree(root)
    raise AssertionError(f"no run was killed, though file operations {fatal - 5} to {fatal} were to be the last ones")


def at_steps(runner: Runner, site: Site, tmp_path: Path, trials: int) -> None:
    points = min(runner.run(tmp_path / f"count{n}")[1] for n in range(3))
    assert points > 60
    steps = [1 + round(n * (points - 1) / max(1, trials - 1)) for n in range(trials)]
    for trial, fatal in enumerate(steps):
        root = tmp_path / f"s{trial}"
        kill_at(runner, root, fatal)
        resume(runner, site, root)
        shutil.rmtree(root)


def test_kill_at_random_bytes(runner: Runner, site: Site, tmp_path: Path) -> None:
    at_bytes(runner, site, tmp_path, 8)


def test_kill_at_file_operations(runner: Runner, site: Site, tmp_path: Path) -> None:
    at_steps(runner, site, tmp_path, 14)


@pytest.mark.long
def test_kill_at_random_bytes_300_times(runner: Runner, site: Site, tmp_path: Path) -> None:
    at_bytes(runner, site, tmp_path, 300)


@pytest.mark.long
def test_kill_at_file_operations_300_times(runner: Runner, site: Site, tmp_path: Path) -> None:
    at_steps(runner, site, tmp_path, 300)
