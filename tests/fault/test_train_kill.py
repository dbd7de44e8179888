"""SIGKILL during real training: trainer, rollout engine, Ray and driver at random moments; the run resumes and loses nothing.

A run is killed again and again until it is done, and compared with a run of the same seed that was left alone; so is a second one.
`RESEARCH_TRAIN_KILLS` sets the number of kills of both together (default 30).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from research_rl import config
from research_rl.config import CHECKOUT
from research_rl.stages import Workspace, run_stage
from research_rl.training import checkpoints
from research_rl.training.metrics_log import MetricsLog
from research_rl.training.supervise import interpreter

pytestmark = [pytest.mark.long, pytest.mark.timeout(4 * 3600)]
RUNS = 2
KILLS = int(os.environ.get("RESEARCH_TRAIN_KILLS", "30")) // RUNS
STEPS = 5 * KILLS
SIZE = (
    *(f"data.generated.{item}" for item in ("entities=60", "train_questions=512", "dev_questions=8", "test_questions=16")),
    *(f"policy.{item}" for item in ("hidden=64", "layers=2", "warmup_steps=60")),
    *(
        f"train.{item}"
        for item in (f"steps={STEPS}", "prompts=2", "group=4", "micro_batch=8", "save_every=1", f"max_attempts={10 * KILLS}")
    ),
    *(f"episode.{item}" for item in ("max_response_tokens=96", "max_result_tokens=48")),
    "train.step_deadline_s=60",
    # This policy is too small to earn a reward, which these rules would rightly stop.
    *(f"watch.{rule}.action=warn" for rule in ("reward_spread", "no_signal", "answered", "cut_off", "searches", "response_short")),
)
VICTIMS = {
    "driver": "",
    "trainer": "ray::WorkerDict",
    "task runner": "ray::TaskRunner",
    "engine": "VLLM::",
    "engine server": "ray::vLLMHttpServer",
    "raylet": "raylet/raylet",
    "control store": "gcs/gcs_server",
}
BEFORE_TRAINING = ("download", "validate", "prepare", "corpus", "embed", "index", "policy")


def workspace(root: Path) -> Workspace:
    root.mkdir()
    space = Workspace(root)
    resolved = config.load_profile("laptop", SIZE)
    config.save(resolved, root / "params.yaml")
    for name in BEFORE_TRAINING:
        run_stage(name, resolved, space)
    return space


class Training:
    """`research run train` as a user starts it, and what it has on disk."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "research_rl", "run", "train", "-w", str(self.space.root)]
        with (self.space.root / "driver.log").open("ab") as log:
            return subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)

    @property
    def work(self) -> Path:
        return next(iter(self.space.root.glob("artifacts/.work/train-*")), self.space.root / "none")

    def logged(self) -> int:
        return MetricsLog(self.work / "metrics.jsonl").last

    def members(self, word: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self, victim: str) -> bool:
        """Kill one process of this kind; return whether there was one."""
        if victim == "driver":
            self.process.kill()
            self.process.wait()
            return True
        members = self.members(VICTIMS[victim])
        for process in members[:1]:
            process.send_signal(signal.SIGKILL)
        return bool(members)


def questions(work: Path) -> list[list[str]]:
    """Return the ids of the questions of every step."""
    rows = [gzip.decompress((work / "rollouts" / f"{step:06d}.jsonl.gz").read_bytes()).splitlines() for step in range(1, STEPS + 1)]
    return [sorted({str(json.loads(line)["id"]) for line in step}) for step in rows]


@pytest.mark.parametrize("number", range(RUNS))
def test_whatever_is_killed_training_goes_on_and_loses_nothing(number: int, tmp_path: Path) -> None:
    assert interpreter(config.load_profile("laptop")).is_file()
    chance, deck = random.Random(number), list[str]()
    training = Training(workspace(tmp_path / "killed"))
    done: Counter[str] = Counter()
    redone: list[int] = []
    last_kill_at, early = 0, False
    while sum(done.values()) < KILLS:
        # Mostly somewhere inside a step, sometimes already during the start of the trainer.
        early = not early and chance.random() < 0.15
        deadline = time.monotonic() + 900
        while not early and training.logged() <= last_kill_at and time.monotonic() < deadline:
            assert training.process.poll() is None, (tmp_path / "killed/driver.log").read_text()[-3000:]
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 8))
        assert training.process.poll() is None, (tmp_path / "killed/driver.log").read_text()[-3000:]
        before = training.logged()
        deck = deck or chance.sample(list(VICTIMS), len(VICTIMS))
        if not training.kill(deck[-1]):
            continue  # not there yet: the trainer is starting
        victim = deck.pop()
        done[victim] += 1
        last_kill_at = before
        print(f"kill {sum(done.values())}: {victim} after step {before}", flush=True)
        if victim == "driver":
            time.sleep(12)
            left = [p for p in psutil.process_iter(["cmdline"]) if str(training.work) in " ".join(p.info["cmdline"] or [])]
            assert left == [], "a killed driver leaves nothing running"
            training.process = training.start()
        newest = checkpoints.latest(training.work / "checkpoints")
        redone.append(before - (newest.step if newest else 0))
    assert training.process.wait(3600) == 0, (tmp_path / "killed/driver.log").read_text()[-3000:]
    work = training.space.folder("train")
    steps = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), "metrics are continuous"
    assert all("episode/reward" in row["metrics"] for row in steps)
    silent = [row["step"] for row in steps if "actor/grad_norm" not in row["metrics"]]
    print(f"kills {dict(done)}; steps whose trainer metrics were lost with the trainer: {silent}; redone finished steps: {max(redone)}")
    assert max(redone) <= 1, "at most one step is done again"
    assert all(
        len(list(json.loads(line) for line in gzip.decompress(p.read_bytes()).splitlines())) == 8 for p in (work / "rollouts").glob("*.gz")
    )

    left_alone = workspace(tmp_path / "left-alone")
    reference = Training(left_alone)
    assert reference.process.wait(3600) == 0
    assert questions(work) == questions(left_alone.folder("train")), "the order of the data goes on as if nothing had happened"
