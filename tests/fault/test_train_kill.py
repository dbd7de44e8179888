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
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from research_rl import config
from research_rl.training.run import checkpoints
from research_rl.training.run.run import interpreter
from tests.training import Training, workspace

pytestmark = [pytest.mark.long, pytest.mark.timeout(4 * 3600)]
RUNS = 2
KILLS = int(os.environ.get("RESEARCH_TRAIN_KILLS", "30")) // RUNS
STEPS = 5 * KILLS
SIZE = (
    *(f"policy.{item}" for item in ("hidden=64", "layers=2", "warmup_steps=60")),
    *(f"train.{item}" for item in (f"steps={STEPS}", "prompts_per_step=2", "rollouts_per_prompt=4")),
    *("trainer.save_every=1", f"trainer.max_attempts={10 * KILLS}"),
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


def kill(training: Training, victim: str) -> bool:
    """Kill one process of this kind; return whether there was one."""
    if victim == "driver":
        training.process.kill()
        training.process.wait()
        return True
    members = training.members(VICTIMS[victim])
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
    training = Training(workspace(tmp_path / "killed", *SIZE))
    done: Counter[str] = Counter()
    redone: list[int] = []
    last_kill_at, early = 0, False
    while sum(done.values()) < KILLS:
        # Mostly somewhere inside a step, sometimes already during the start of the trainer.
        early = not early and chance.random() < 0.15
        deadline = time.monotonic() + 900
        while not early and training.logged() <= last_kill_at and time.monotonic() < deadline:
            assert training.process.poll() is None, training.said()
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 8))
        assert training.process.poll() is None, training.said()
        before = training.logged()
        deck = deck or chance.sample(list(VICTIMS), len(VICTIMS))
        if not kill(training, deck[-1]):
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
    assert training.process.wait(3600) == 0, training.said()
    work = training.space.folder("train")
    steps = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), "metrics are continuous"
    assert all({"episode/reward", "actor/grad_norm"} <= row["metrics"].keys() for row in steps)
    print(f"kills {dict(done)}; redone finished steps: {max(redone)}")
    assert max(redone) <= 1, "at most one step is done again"
    assert all(
        len(list(json.loads(line) for line in gzip.decompress(p.read_bytes()).splitlines())) == 8 for p in (work / "rollouts").glob("*.gz")
    )

    left_alone = workspace(tmp_path / "left-alone", *SIZE)
    reference = Training(left_alone)
    assert reference.process.wait(3600) == 0
    assert questions(work) == questions(left_alone.folder("train")), "the order of the data goes on as if nothing had happened"
