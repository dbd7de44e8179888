"""SIGKILL during real training: trainer, rollout engine, Ray and driver in every phase of a step; the run resumes and loses nothing.

A run is killed again and again until it is done, and compared with a run of the same seed that was left alone; so is a second one.
The phase of a kill is seen on disk, so that a fast machine and a slow one are killed in the same places. `RESEARCH_TRAIN_KILLS` sets
the number of kills of both together (default 30).
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
from typing import NamedTuple

import psutil
import pytest

from research_rl import config
from research_rl.training.run import checkpoints
from research_rl.training.run.run import interpreter
from tests.training import Training, workspace
from tests.waiting import until

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


class Kill(NamedTuple):
    """Which kind of process was killed, after which finished step, in which attempt."""

    victim: str
    step: int
    attempt: int


PHASES = ("start", "rollout", "update", "saving", "logging")
EPISODES = 8


def phase(training: Training) -> str:
    """Return what the trainer does now, as its files show it, for the step after the last one in the merged metrics."""
    work, step = training.work, training.logged() + 1
    tracker = work / "checkpoints/latest_checkpointed_iteration.txt"
    if tracker.is_file() and int(tracker.read_text() or 0) >= step:
        return "logging"
    if (work / f"checkpoints/global_step_{step}").is_dir():
        return "saving"
    played = sum(len(path.read_bytes().splitlines()) for path in (work / f"episodes/train/{step:06d}").glob("*.jsonl"))
    return "update" if played == EPISODES else "rollout" if played else "start"


def victim_there(training: Training, victim: str) -> psutil.Process | None:
    """Return a process of this kind, None while there is none."""
    if victim == "driver":
        return psutil.Process(training.process.pid)
    return next(iter(training.members(VICTIMS[victim])), None)


def attempts(training: Training) -> int:
    """Return how often the trainer was started."""
    return len(list((training.work / "logs").glob("attempt_*.log")))


def killed_in(training: Training, wanted: str, deck: list[str], last: Kill) -> Kill:
    """Kill a process in the wanted phase of a later attempt: the first kind of `deck` that there is.

    All phases but the start of the trainer wait for a step of that attempt: two attempts in a row without one end a run.
    """
    while True:
        assert training.process.poll() is None, training.said()
        step, attempt = training.logged(), attempts(training)
        if attempt == last.attempt or (wanted != "start" and step <= last.step):
            time.sleep(0.05)
            continue
        # Looking for a process takes longer than some phases, so it is known before the phase comes. At the start it is waited for.
        names = [name for name in deck if name != "engine"][:1] if wanted == "start" else deck
        found = next(((name, process) for name in names if (process := victim_there(training, name))), None)
        while found and training.logged() == step and found[1].is_running():
            if phase(training) == wanted:
                found[1].send_signal(signal.SIGKILL)
                return Kill(found[0], step, attempt)
            time.sleep(0.002)


def questions(work: Path) -> list[list[str]]:
    """Return the ids of the questions of every step."""
    rows = [gzip.decompress((work / "rollouts" / f"{step:06d}.jsonl.gz").read_bytes()).splitlines() for step in range(1, STEPS + 1)]
    return [sorted({str(json.loads(line)["id"]) for line in step}) for step in rows]


def order(kills: int, chance: random.Random) -> list[str]:
    """Return the phases to kill in: each as often as the others, and never two starts in a row."""
    rounds = [chance.sample(PHASES, len(PHASES)) for _ in range(-(-kills // len(PHASES)))]
    drawn = [name for one in rounds for name in one][:kills]
    for place in range(1, len(drawn)):
        if drawn[place - 1] == drawn[place] == "start":
            other = (place + 1) % len(drawn)
            drawn[place], drawn[other] = drawn[other], drawn[place]
    return drawn


def wait_until_nothing_runs(training: Training) -> None:
    """Wait until nothing of a killed driver is left; its guards need a moment."""

    def left() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if str(training.work) in " ".join(p.info["cmdline"] or [])]

    assert until(lambda: not left()), f"a killed driver leaves {left()} running"


@pytest.mark.parametrize("number", range(RUNS))
def test_whatever_is_killed_training_goes_on_and_loses_nothing(number: int, tmp_path: Path) -> None:
    assert interpreter(config.load_profile("laptop")).is_file()
    chance = random.Random(number)
    training = Training(workspace(tmp_path / "killed", *SIZE))
    done: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    redone: list[int] = []
    deck = chance.sample(list(VICTIMS), len(VICTIMS))
    last = Kill("", 0, 0)
    for wanted in order(KILLS, chance):
        last = killed_in(training, wanted, deck, last)
        deck.remove(last.victim)
        deck.append(last.victim)
        done[last.victim] += 1
        hit[wanted] += 1
        print(f"kill {sum(done.values())}: {last.victim} in {wanted} after step {last.step}", flush=True)
        if last.victim == "driver":
            training.process.wait()
            wait_until_nothing_runs(training)
            training.process = training.start()
        newest = checkpoints.latest(training.work / "checkpoints")
        redone.append(last.step - (newest.step if newest else 0))
    assert training.process.wait(3600) == 0, training.said()
    work = training.space.folder("train")
    steps = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), "metrics are continuous"
    assert all({"episode/reward", "actor/grad_norm"} <= row["metrics"].keys() for row in steps)
    assert len(PHASES) > KILLS or set(hit) == set(PHASES), "every phase of a step is hit"
    print(f"kills {dict(done)} in {dict(hit)}; redone finished steps: {max(redone)}")
    assert max(redone) <= 1, "at most one step is done again"
    assert all(
        len(list(json.loads(line) for line in gzip.decompress(p.read_bytes()).splitlines())) == 8 for p in (work / "rollouts").glob("*.gz")
    )

    left_alone = workspace(tmp_path / "left-alone", *SIZE)
    reference = Training(left_alone)
    assert reference.process.wait(3600) == 0
    assert questions(work) == questions(left_alone.folder("train")), "the order of the data goes on as if nothing had happened"
