"""GPU check a: GRPO through verl and vLLM (or SGLang) on a real model by the clock, with held-out questions before and after.

Usage: python tests/gpu/grpo.py --workspace FOLDER [--engine vllm|sglang] [--since EPOCH] [--until S] [--within S] [--python PATH] [--toy]
[section.key=value ...]. The workspace holds params.yaml and the stages up to `index`; here policy, baseline, train, export and evaluate
run. The plan: held-out questions; training until second `--until`, as many steps as fit and at least one; held-out questions again; all
within `--within` seconds of `--since`, the moment the machine was given. What is found is printed and appended to `--out` as it comes, one
JSON line an event; at the last second the check ends whatever runs and says what it lacks. `--toy` makes the workspace of the tiny policy
by itself and follows the same plan on the processor. Asserts that a step was made, that no trajectory was lost, and (not for the toy, and
from eight steps on) that reward and held-out F1 rose.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research_rl import config as configuration
from research_rl.config import Config
from research_rl.evaluation.comparison import compare_metrics, match
from research_rl.evaluation.results import read_results
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Context, Workspace
from research_rl.training.run.run import TrainHooks
from research_rl.training.train import run_with

BEFORE = ("download", "validate", "prepare", "corpus", "embed", "index")
RISES_FROM = 8
"""Steps from which on reward and F1 must have risen; fewer show that the path works."""
CLEANUP_S = 15.0
"""How long before the end everything is stopped."""
MOST_STEPS = 10_000
REAL = [
    "train.hardware=gpu",
    "serving.hardware=gpu",
    "serving.dtype=bfloat16",
    "serving.eager=true",
    "trainer.tensor_parallel=1",
    "trainer.gpu_memory_utilization=0.3",
    "trainer.gradient_checkpointing=false",
    "trainer.max_tokens_per_gpu=2048",
    "train.prompts_per_step=32",
    "train.rollouts_per_prompt=8",
    "train.mini_batch=16",
    "train.lr=2e-5",
    "trainer.validate_every=null",
]
HOST = {
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.rollout.free_cache_engine": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "ray_kwargs.ray_init.num_cpus": 64,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 2_000_000_000,
}
"""A bare host has no flash-attn: sdpa attends over a whole packed micro-batch, hence the small ones. The rest keeps the start short."""
OF_VLLM = {"+actor_rollout_ref.rollout.enable_sleep_mode": False}
TOY = [
    "data.generated.entities=60",
    "data.generated.train_questions=64",
    "data.generated.dev_questions=8",
    "data.generated.test_questions=16",
    "policy.hidden=64",
    "policy.layers=2",
    "policy.warmup_steps=60",
    "train.prompts_per_step=4",
    "train.rollouts_per_prompt=4",
    "trainer.micro_batch=8",
    "episode.max_response_tokens=128",
    "episode.max_result_tokens=64",
    "evaluation.rows=8",
    "evaluation.bootstrap=100",
]
BY_THE_CLOCK = [f"train.steps={MOST_STEPS}", "trainer.save_every=1"]
"""The clock ends training, so every step leaves a checkpoint to end with."""


class OutOfTime(KeyboardInterrupt):
    """The last second has come; event loops pass on what they would pass on of an interrupt, and nothing else."""


class Enough(Exception):
    """No further step fits; `step` has a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass
class Log:
    """Events of the check as JSON lines, with the second of the plan at which they came."""

    path: Path
    since: float
    rewards: list[float] = field(default_factory=list[float])

    @property
    def now(self) -> float:
        """Seconds since the machine was given."""
        return time.time() - self.since

    def add(self, event: str, **values: Any) -> None:
        """Print one line and append it to the file."""
        line = json.dumps({"at": round(self.now, 1), "event": event, **values})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


class Clock(TrainHooks):
    """Notes every step and ends training at the checkpoint after which no further step fits before second `until`."""

    def __init__(self, log: Log, until: float) -> None:
        self.log, self.until = log, until
        self.last, self.longest = log.now, 0.0

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's reward and time."""
        self.log.rewards.append(metrics["episode/reward"])
        kept = ("episode/reward", "episode/f1", "episode/searches", "episode/mixed_groups", "episode/lost", "timing_s/step")
        self.log.add("step", step=step, **{name: round(metrics[name], 4) for name in kept if name in metrics})
        if step > 1:
            self.longest = max(self.longest, self.log.now - self.last)
        self.last = self.log.now

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Raise Enough when the time is up."""
        self.log.add("checkpoint", step=step)
        if self.log.now + self.longest > self.until:
            raise Enough(step)


def main() -> None:
    """Follow the plan and print what it shows."""
    arguments = parsed()
    config, workspace = resolve(arguments), Workspace(arguments.workspace.resolve())
    workspace.root.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out or workspace.root / "grpo.jsonl", arguments.since)
    log.add("start", toy=arguments.toy, engine=config.train.engine, until=arguments.until, within=arguments.within)
    found: dict[str, Any] = {}
    try:
        with alarm(arguments.within - CLEANUP_S - log.now):
            follow(config, workspace, log, arguments, found)
    except OutOfTime:
        log.add("out of time", **found)
        sys.exit(f"the plan did not end within {arguments.within:g} s; {log.path} holds what it found")
    log.add("end", check="grpo", toy=arguments.toy, **found)
    require(found, log, arguments.toy)


def parsed() -> argparse.Namespace:
    """Return the arguments, the clock's included."""
    parser = argparse.ArgumentParser(description="GRPO on a real model, measured before and after, within a given time.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm", help="engine of rollouts and of the held-out questions")
    parser.add_argument("--python", help="interpreter with verl and the engine; environments.policy when left out")
    parser.add_argument("--since", type=float, default=time.time(), help="when the machine was given, seconds since 1970 (default: now)")
    parser.add_argument("--until", type=float, help="second at which training ends (default: 330, toy 60)")
    parser.add_argument("--within", type=float, help="second at which the check has ended (default: 540, toy 3600)")
    parser.add_argument("--out", type=Path, help="file of the JSON lines (default: grpo.jsonl in the workspace)")
    parser.add_argument("--toy", action="store_true", help="tiny policy on the processor")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    until, within = (60.0, 3600.0) if arguments.toy else (330.0, 540.0)
    arguments.until = until if arguments.until is None else arguments.until
    arguments.within = within if arguments.within is None else arguments.within
    if arguments.within <= arguments.until + CLEANUP_S:
        parser.error(f"--within {arguments.within:g} leaves no time after --until {arguments.until:g}; {CLEANUP_S:g} s are for stopping")
    return arguments


def resolve(arguments: argparse.Namespace) -> Config:
    """Return the workspace's configuration with the check's overrides."""
    chosen = [f"train.engine={arguments.engine}", f"serving.engine={arguments.engine}", *BY_THE_CLOCK]
    chosen += [f"environments.policy={arguments.python}"] if arguments.python else []
    if arguments.toy:
        return configuration.load_profile("laptop", [*TOY, *chosen, *arguments.overrides])
    extra = f"train.extra={json.dumps(HOST | (OF_VLLM if arguments.engine == 'vllm' else {}))}"
    return configuration.load(arguments.workspace / "params.yaml", [*REAL, extra, *chosen, *arguments.overrides])


@contextmanager
def alarm(seconds: float) -> Generator[None]:
    """Raise OutOfTime in this block after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def follow(config: Config, workspace: Workspace, log: Log, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run the plan; `found` gets what each part of it shows as soon as it is there."""
    for name in (*(BEFORE if arguments.toy else ()), "policy"):
        log.add("stage", name=name)
        run_stage(name, config, workspace)
    found["model"] = config.policy.path or config.policy.source
    found["before"] = held_out("baseline", config, workspace, log)
    config = trained(config, workspace, log, arguments.until)
    counts = json.loads((workspace.folder("train") / "manifest.json").read_text())["counts"]
    found |= {"steps": counts["steps"], "lost": counts["lost_trajectories"]}
    run_stage("export", config, workspace)
    found["after"] = held_out("evaluate", config, workspace, log)
    pairs = match(*(read_results(workspace.folder(name)) for name in ("baseline", "evaluate"))).pairs
    found["difference"] = {
        metric.name: metric.difference.to_json()
        for metric in compare_metrics(pairs, config.evaluation.bootstrap, config.evaluation.seed)
        if metric.name in ("f1", "em", "reward")
    }


def held_out(stage: str, config: Config, workspace: Workspace, log: Log) -> dict[str, float]:
    """Play the held-out questions; return their means."""
    log.add("stage", name=stage)
    run_stage(stage, config, workspace)
    metrics = json.loads((workspace.folder(stage) / "metrics.json").read_text())
    means = {name: metrics[name]["mean"] for name in ("f1", "em", "reward", "searches")}
    log.add("held-out questions", stage=stage, questions=metrics["n"], **means)
    return means


def trained(config: Config, workspace: Workspace, log: Log, until: float) -> Config:
    """Train until the clock says enough and publish the last step; return the configuration with that many steps."""
    log.add("stage", name="train")
    clock = Clock(log, until)

    def work(context: Context) -> None:
        run_with(context, clock)

    try:
        run_stage("train", config, workspace, function=work)
        return config
    except Enough as enough:
        shorter = config.model_copy(update={"train": config.train.model_copy(update={"steps": enough.step})})
        run_stage("train", shorter, workspace)
        return shorter


def require(found: dict[str, Any], log: Log, toy: bool) -> None:
    """Assert what the check is for."""
    assert found["steps"] >= 1 and found["lost"] == 0, found
    part = max(1, len(log.rewards) // 5)
    rose = sum(log.rewards[-part:]) > sum(log.rewards[:part]) and found["after"]["f1"] > found["before"]["f1"]
    assert toy or found["steps"] < RISES_FROM or rose, found


if __name__ == "__main__":
    main()
