"""The GPU check plans by the clock: what ends training, what is too late, what is written as it comes, and what it asserts."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Context, Workspace
from research_rl.training.run.run import TrainHooks

METRICS = {"episode/reward": 0.5, "episode/f1": 0.25, "timing_s/step": 9.0, "actor/lr": 1e-5}


def loaded() -> ModuleType:
    """The check is a script for a machine without this repository's tests, so it is in no package."""
    spec = importlib.util.spec_from_file_location("gpu_grpo", CHECKOUT / "tests" / "gpu" / "grpo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_grpo"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


grpo = loaded()


class At:
    """A clock in the check's place, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(grpo.time, "time", lambda: self.now)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    return At(monkeypatch)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stepped(clock: TrainHooks, at: At, step: int, seconds: float) -> None:
    at.now += seconds
    clock.on_step(step, METRICS)
    clock.on_checkpoint(step, Path())


def test_training_ends_at_the_checkpoint_after_which_no_further_step_fits(tmp_path: Path, at: At) -> None:
    """The first step is no measure, it holds the start; the longest one since is taken for the next."""
    clock = grpo.Clock(grpo.Log(tmp_path / "out", at.now), until=330)
    stepped(clock, at, 1, 200)
    stepped(clock, at, 2, 40)
    stepped(clock, at, 3, 30)
    with pytest.raises(grpo.Enough) as enough:
        stepped(clock, at, 4, 25)  # second 295, and a step may take 40
    assert enough.value.step == 4


def test_a_first_step_that_came_too_late_is_the_last_one(tmp_path: Path, at: At) -> None:
    clock = grpo.Clock(grpo.Log(tmp_path / "out", at.now), until=330)
    with pytest.raises(grpo.Enough) as enough:
        stepped(clock, at, 1, 331)
    assert enough.value.step == 1


def test_what_was_found_stands_in_the_file_at_once(tmp_path: Path, at: At) -> None:
    clock = grpo.Clock(log := grpo.Log(tmp_path / "out", at.now), until=330)
    at.now += 12.34
    clock.on_step(1, METRICS)
    step = {"at": 12.3, "event": "step", "step": 1, "episode/reward": 0.5, "episode/f1": 0.25, "timing_s/step": 9.0}
    assert lines(tmp_path / "out") == [step] and log.rewards == [0.5]
    clock.on_checkpoint(1, Path())
    assert lines(tmp_path / "out") == [step, {"at": 12.3, "event": "checkpoint", "step": 1}]


def test_the_last_second_interrupts_whatever_runs_and_leaves_no_alarm() -> None:
    started = time.monotonic()
    with pytest.raises(grpo.OutOfTime), grpo.alarm(0.05):
        time.sleep(30)
    assert time.monotonic() - started < 20
    with grpo.alarm(0.05):
        pass
    time.sleep(0.2)  # an alarm that stood would end the process


def test_a_plan_that_has_no_time_left_ends_at_once() -> None:
    with pytest.raises(grpo.OutOfTime), grpo.alarm(-5):
        time.sleep(30)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--until", "600"], "--within 540 leaves no time after --until 600"),
        (["--within", "340"], "--within 340 leaves no time after --until 330"),
        (["--toy", "--within", "70"], "--within 70 leaves no time after --until 60"),
    ],
)
def test_a_plan_that_cannot_end_in_time_is_refused(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--workspace", "w", *given])
    with pytest.raises(SystemExit, match="2"):
        grpo.parsed()
    assert said in capsys.readouterr().err


def test_a_check_that_runs_out_of_time_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(name: str, *_: Any) -> None:
        # An answer is there, the next part never ends.
        if name == "baseline":
            time.sleep(60)

    monkeypatch.setattr(grpo, "run_stage", slow)
    arguments = ["--toy", "--workspace", str(tmp_path), "--until", "1", "--within", str(grpo.CLEANUP_S + 2)]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
    with pytest.raises(SystemExit, match=r"did not end within 17 s; .*grpo\.jsonl holds what it found"):
        grpo.main()
    found = lines(tmp_path / "grpo.jsonl")
    assert [line["event"] for line in found] == ["start", *["stage"] * 8, "out of time"]
    assert found[-1]["model"] and "before" not in found[-1] and found[-2]["name"] == "baseline"


def test_what_the_clock_ended_is_published_as_a_training_of_that_many_steps(
    tmp_path: Path, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def trained(context: Context, hooks: TrainHooks) -> None:
        for step in range(1, 10):
            stepped(hooks, at, step, 100)

    def stage(name: str, config: Any, workspace: Workspace, function: Any = None) -> None:
        asked.append(config.train.steps)
        if function:
            function(None)

    monkeypatch.setattr(grpo, "run_with", trained)
    monkeypatch.setattr(grpo, "run_stage", stage)
    config = grpo.configuration.load_profile("laptop", grpo.BY_THE_CLOCK)
    shorter = grpo.trained(config, Workspace(tmp_path), grpo.Log(tmp_path / "out", at.now), 330.0)
    assert asked == [grpo.MOST_STEPS, 3] and shorter.train.steps == 3


def found(steps: int = 10, lost: int = 0, after: float = 0.6) -> dict[str, Any]:
    return {"steps": steps, "lost": lost, "before": {"f1": 0.5}, "after": {"f1": after}}


RISING, FALLING = [0.1 * step for step in range(10)], [1 - 0.1 * step for step in range(10)]


@pytest.mark.parametrize(
    ("shown", "rewards", "toy", "good"),
    [
        (found(), RISING, False, True),
        (found(after=0.5), RISING, False, False),
        (found(), FALLING, False, False),
        (found(lost=1), RISING, False, False),
        (found(steps=0), [], True, False),
        (found(lost=1), RISING, True, False),
        (found(steps=7, after=0.4), FALLING[:7], False, True),
        (found(after=0.4), FALLING, True, True),
        (found(steps=1), [0.2], False, True),
    ],
    ids=["rose", "F1 stood", "reward fell", "lost one", "no step", "toy lost one", "too few steps to tell", "toy", "one step"],
)
def test_the_check_asserts_steps_no_loss_and_from_eight_steps_on_a_rise(
    shown: dict[str, Any], rewards: list[float], toy: bool, good: bool, tmp_path: Path
) -> None:
    log = grpo.Log(tmp_path / "out", 0.0, rewards)
    if good:
        grpo.require(shown, log, toy)
    else:
        with pytest.raises(AssertionError):
            grpo.require(shown, log, toy)
