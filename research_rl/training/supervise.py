"""Run verl's trainer as a watched subprocess until every step is done. Knows processes, files and deadlines; knows no stage.

Invariants: (1) nothing an attempt started outlives it (`launch`), Ray's daemons included; (2) an attempt that is
silent past its deadline is ended and the next resumes from the last whole checkpoint; (3) `metrics.jsonl` and `rollouts/`
hold each step exactly once, whatever was killed in between; (4) time in which searching paused counts against no deadline,
and is itself bounded by `retriever.pause_max_s`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from research_rl.config import CHECKOUT, Config
from research_rl.errors import TrainingError
from research_rl.retriever import TOKEN
from research_rl.stages import Progress
from research_rl.training import checkpoints, episodes, launch, overrides, watch
from research_rl.training.checkpoints import Checkpoint
from research_rl.training.metrics_log import MetricsLog, Tail, numbers
from research_rl.training.overrides import Paths
from research_rl.training.pauses import Pauses
from research_rl.training.remote import Store, Uploader, restore
from research_rl.training.watch import Finding
from research_rl.trajectory import SearchFault, StopReason

__all__ = ["Outcome", "Run", "TrainHooks", "interpreter", "ray_folder", "supervise"]

MAX_LOST = 0.1
"""Largest share of a step's trajectories that may be missing before training on the rest is refused."""
MAX_FAILED_SEARCHES = 0.5
"""Largest share of a step's searches that may bring no passage before the retriever counts as lost."""
_POLL_S = 0.2
_TAIL_LINES = 30
_ERROR = re.compile(r"^(?:\x1b\[\d+m\(.*?\)\x1b\[0m )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)
_PADDED = re.compile(r"Upsampled batch from (\d+) to (\d+) with (\d+) synthetic padding samples")


class TrainHooks:
    """What a caller wants to hear while training runs; each call comes from the supervising thread, in order of steps.

    A run that resumes in a new process repeats the calls of the steps it keeps, so that a fresh listener sees them all.
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Hear a finished step's metrics."""

    def on_rollouts(self, step: int, path: Path) -> None:
        """Hear where a step's episodes lie: gzip, one JSON object a line."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Hear of a whole, sealed checkpoint; its folder is removed when newer ones take its place."""

    def on_attempt(self, number: int, resume: int) -> None:
        """Hear that the trainer is started for the `number`-th time, going on from step `resume` (0: from the beginning)."""

    def on_attempt_end(self, number: int, why: str | None) -> None:
        """Hear why a start of the trainer ended, None when all steps are done. Never called when this process is killed."""

    def on_finding(self, finding: Finding, kept: Checkpoint | None) -> None:
        """Hear of a rule of `watch` whose breach begins or stops the run, and of the last good checkpoint."""


@dataclass(frozen=True)
class Run:
    """One training run: what to train, where to work, whom to search. `services` holds the trainer's pid file."""

    config: Config
    paths: Paths
    services: Path
    retriever_url: str
    retriever_token: str | None = None
    store: Store | None = None

    @cached_property
    def launcher(self) -> launch.Launcher:
        """What starts the trainer."""
        return launch.launcher(self.config, self.services, self.retriever_url)

    @property
    def interpreter(self) -> Path:
        """The policy environment's interpreter; on a cluster only its nodes need to have it."""
        if self.config.cluster.launcher == "local":
            return interpreter(self.config)
        return CHECKOUT / self.config.environments.policy

    @property
    def metrics(self) -> Path:
        """The merged metrics, one line a step."""
        return self.paths.work / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """One compressed file of episodes per step."""
        return self.paths.work / "rollouts"

    @property
    def logs(self) -> Path:
        """One log and one raw metrics file per attempt."""
        return self.paths.work / "logs"


@dataclass
class Outcome:
    """How a run ended: its last checkpoint, the attempts it took and the trajectories lost on the way."""

    checkpoint: Checkpoint
    attempts: int
    lost: int


def interpreter(config: Config) -> Path:
    """Return the policy environment's interpreter. Raises TrainingError when it is not there."""
    path = Path(config.environments.policy)
    path = path if path.is_absolute() else CHECKOUT / path
    if not path.is_file():
        raise TrainingError(f"environments.policy={config.environments.policy!r} does not exist ({path}); run `make setup` or set it")
    return path


def supervise(run: Run, hooks: TrainHooks, progress: Progress) -> Outcome:
    """Train until `train.steps` are done; resume after a failure. Raises TrainingError with the last log lines."""
    run.launcher.reap()
    _make_folders(run)
    _restore(run, progress)
    state = _State(run, hooks, progress, MetricsLog(run.metrics))
    state.replay()
    with _uploading(run, progress) as state.uploader:
        checkpoint = _train(state)
    checkpoints.prune(run.paths.checkpoints, run.config.train.keep_checkpoints)
    return Outcome(checkpoint, state.attempts(), state.lost)


def _train(state: _State) -> Checkpoint:
    """Start the trainer until the last step has a whole checkpoint. Raises TrainingError."""
    run = state.run
    failures: list[_Failure] = []
    while (checkpoint := state.rewind()) is None or checkpoint.step < run.config.train.steps:
        if len(failures) >= run.config.train.max_attempts or [f.progressed for f in failures[-2:]] == [False, False]:
            raise TrainingError(_explain(run, failures))
        failure = _Attempt(state, checkpoint).run()
        failures += [failure] if failure else []
    return checkpoint


def _restore(run: Run, progress: Progress) -> None:
    """Bring the newest checkpoint from S3 when none that is as new lies here."""
    if run.store:
        found = checkpoints.latest(run.paths.checkpoints, run.config.train.steps)
        restore(run.store, run.paths.work, run.paths.checkpoints, found.step if found else 0, run.config.train.steps, _to(progress))


@contextmanager
def _uploading(run: Run, progress: Progress) -> Generator[Uploader | None]:
    """Copy checkpoints to S3 for the length of a block; its regular end waits for the last one."""
    if run.store is None:
        yield None
        return
    uploader = Uploader(run.store, run.paths.work, run.config.train.keep_checkpoints, _to(progress))
    finished = False
    try:
        yield uploader
        finished = True
    finally:
        if not uploader.close(run.config.train.upload_wait_s if finished else 0.0):
            progress("checkpoints are left to be copied to S3; the next run of this stage goes on with them", 1.0)


def _to(progress: Progress) -> Callable[[str], None]:
    return lambda text: progress(text, 0.0)


@dataclass(frozen=True)
class _Failure:
    attempt: int
    why: str
    progressed: bool
    tail: str


@dataclass
class _State:
    """What is known of a run over all its attempts."""

    run: Run
    hooks: TrainHooks
    progress: Progress
    log: MetricsLog
    lost: int = 0
    padding: int = 0
    uploader: Uploader | None = None

    def attempts(self) -> int:
        """Return how often the trainer was started for this run, earlier processes included."""
        return len(list(self.run.logs.glob("attempt_*.log")))

    def replay(self) -> None:
        """Tell the hooks of the steps an earlier process finished and this one keeps."""
        found = checkpoints.latest(self.run.paths.checkpoints, self.run.config.train.steps)
        for step in sorted(self.log.rows):
            if found and step <= found.step:
                self._tell(step)

    def rewind(self) -> Checkpoint | None:
        """Return the checkpoint to go on from, after forgetting everything later than it."""
        watch.restore(self.run.paths.checkpoints, self.run.paths.work)
        found = self._with_metrics(
            checkpoints.latest(self.run.paths.checkpoints, self.run.config.train.steps, verify=True, passed_over=self._passed_over)
        )
        step = found.step if found else 0
        if found:
            checkpoints.seal(found.path)
        checkpoints.discard_after(self.run.paths.checkpoints, step)
        episodes.discard_after(self.run.paths.episodes, step)
        for path in self.run.rollouts.rglob("*.jsonl.gz"):
            if int(path.name.split(".")[0]) > step:
                path.unlink()
        self.log.rewind(step)
        for missing in self.log.missing(step):
            # Where more than one step would be done again, the episodes are the only witness of a step that was saved but not logged.
            self.finish(missing, self._logged(missing))
        return found

    def _with_metrics(self, found: Checkpoint | None) -> Checkpoint | None:
        """Return the one of the step before, where verl was killed between saving a step and logging it and this costs one step only."""
        if found is None or found.step in self.log.rows or self._logged(found.step):
            return found
        before = checkpoints.latest(self.run.paths.checkpoints, found.step - 1, verify=True)
        if (before.step if before else 0) < found.step - 1:
            return found
        self._passed_over(found, "the trainer ended before it wrote this step's metrics; the step is done again")
        return before

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Record a done step: merge the episodes' metrics, keep its episodes, tell the hooks. Raises TrainingError."""
        rows = episodes.gather(self.run.paths.episodes, step)
        _write_rollouts(self.run.rollouts / f"{step:06d}.jsonl.gz", rows)
        validated = self.validated(step)
        episodes.discard(self.run.paths.episodes, step)
        losses = episodes.losses(rows, self.run.config.train.prompts, self.run.config.train.group)
        self.log.put(step, {**metrics, **episodes.summarise(rows), **losses, **validated})
        findings = watch.verdicts(self.run.config.watch, self.log.rows, step)
        self.log.put(step, {**self.log.rows[step], **watch.levels(self.run.config.watch, findings)})
        self._tell(step)
        self._require_whole(step, rows)
        self._heed(findings)

    def validated(self, step: int) -> dict[str, float]:
        """Keep the greedy episodes played on dev after `step`; return their means under `dev/`, none when none were played."""
        rows = episodes.gather(self.run.paths.episodes, step, episodes.DEV)
        if rows:
            _write_rollouts(self.run.rollouts / episodes.DEV / f"{step:06d}.jsonl.gz", rows)
            episodes.discard(self.run.paths.episodes, step, episodes.DEV)
        return {f"dev/{name.removeprefix('episode/')}": value for name, value in episodes.summarise(rows).items()}

    def _logged(self, step: int) -> dict[str, float]:
        """Return what verl wrote about a step that no supervisor took up before it was killed; nothing when verl wrote nothing."""
        for path in sorted(self.run.logs.glob("attempt_*.metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
            for row in map(json.loads, Tail(path).lines()):
                if int(row["step"]) == step:
                    return numbers(row["data"])
        return {}

    def _passed_over(self, checkpoint: Checkpoint, why: str) -> None:
        share = checkpoint.step / self.run.config.train.steps
        self.progress(f"checkpoint of step {checkpoint.step} is passed over: {why}", min(1.0, share))

    def padded(self, line: str) -> None:
        """Count trajectories that verl replaced by padding, before the step is reported. Raises TrainingError past the limit."""
        if found := _PADDED.search(line):
            size, self.padding = int(found[2]), int(found[3])
            self._lose(self.padding, size, "verl replaced them by padding; the agent loop raised, see the log")

    def say(self, text: str) -> None:
        """Tell the caller what happens between two steps."""
        self.progress(text, min(1.0, self.log.last / self.run.config.train.steps))

    def _tell(self, step: int) -> None:
        metrics, steps = self.log.rows[step], self.run.config.train.steps
        self.hooks.on_step(step, metrics)
        self.hooks.on_rollouts(step, self.run.rollouts / f"{step:06d}.jsonl.gz")
        reward = metrics.get("episode/reward", metrics.get("critic/score/mean", 0.0))
        self.progress(f"step {step} of {steps}, reward {reward:.3f}", min(1.0, step / steps))

    def _heed(self, findings: Sequence[Finding]) -> None:
        """Keep the last good checkpoint, tell of breaches that begin, and raise CollapseError for one that stops the run."""
        kept = watch.keep_good(self.run.paths.checkpoints, self.run.paths.work, findings, self.log.rows)
        for finding in findings:
            if finding.stops or finding.since == finding.step:
                self.hooks.on_finding(finding, kept)
                self.progress(f"watch {'stops' if finding.stops else 'warns'}: {finding.text}", finding.step / self.run.config.train.steps)
            if finding.stops:
                raise watch.collapse(finding, kept)

    def _require_whole(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        train = self.run.config.train
        expected = train.prompts * train.group
        missing, self.padding = expected - len(rows) - self.padding, 0
        if missing > 0:
            self._lose(missing, expected, f"step {step} left no record of them; the agent loop raised, see the log")
        broken = [row for row in rows if row["stop"] == StopReason.ENGINE_FAILURE.value]
        example = f", the first with {broken[0]['error']}" if broken else ""
        self._lose(len(broken), expected, f"the engine failed in step {step}{example}")
        searches = [search for row in rows for search in row["searches"] if search["fault"] != SearchFault.EMPTY_QUERY.value]
        faults = [search for search in searches if search["fault"] is not None]
        failed = [search["error"] or search["fault"] for search in faults if SearchFault(search["fault"]).is_service]
        if len(failed) > MAX_FAILED_SEARCHES * max(len(searches), 1):
            raise TrainingError(
                f"{len(failed)} of {len(searches)} searches of step {step} failed (limit {MAX_FAILED_SEARCHES:.0%}), "
                f"the first with {failed[0]!r}; check the retriever at {self.run.retriever_url}"
            )

    def _lose(self, count: int, expected: int, why: str) -> None:
        self.lost += count
        if count:
            self.say(f"{count} of {expected} trajectories of a step were lost: {why}")
        if count > MAX_LOST * expected:
            raise TrainingError(f"{count} of {expected} trajectories of a step were lost (limit {MAX_LOST:.0%}): {why}")


@dataclass
class _Attempt:
    """One start of the trainer."""

    state: _State
    resume: Checkpoint | None
    number: int = 0
    steps: int = 0
    last: float = 0.0
    announced: int = 0

    def __post_init__(self) -> None:
        self.pauses = Pauses(self.state.run.paths.pauses, self.state.run.config.retriever.pause_max_s)

    def run(self) -> _Failure | None:
        """Start, watch and end the trainer; return why it must be started again, None when all steps are done."""
        self.number = self.state.attempts() + 1
        self.announced = self.resume.step if self.resume else 0
        paths = replace(self.state.run.paths, resume=self.resume.path if self.resume else None)
        shutil.rmtree(paths.ray, ignore_errors=True)
        shutil.rmtree(paths.pauses, ignore_errors=True)
        hooks = self.state.hooks
        hooks.on_attempt(self.number, self.announced)
        process = self._start(paths)
        why: str | None = "was stopped by an error of its caller"
        try:
            why = self._watch(process)
        finally:
            process.stop()
            shutil.rmtree(paths.ray, ignore_errors=True)
            hooks.on_attempt_end(self.number, why)
        return _Failure(self.number, why, self.steps > 0, process.tail(_TAIL_LINES)) if why else None

    def _start(self, paths: Paths) -> launch.Started:
        run = self.state.run
        paths.agent.write_text(overrides.agent_yaml(run.config, paths, run.retriever_url))
        env = overrides.environment(run.config, paths, secrets.token_hex(32))
        env["VERL_FILE_LOGGER_PATH"] = str(self._raw_metrics)
        env["RESEARCH_GRACE_S"] = "3"
        if run.retriever_token:
            env[TOKEN] = run.retriever_token
        command = [str(run.interpreter), "-m", "verl.trainer.main_ppo", *overrides.render(run.config, paths)]
        command.append(f"hydra.run.dir={paths.work / 'hydra'}")
        return run.launcher.start(command, env, paths.work, self._log)

    @property
    def _log(self) -> Path:
        return self.state.run.logs / f"attempt_{self.number}.log"

    @property
    def _raw_metrics(self) -> Path:
        return self.state.run.logs / f"attempt_{self.number}.metrics.jsonl"

    def _watch(self, process: launch.Started) -> str | None:
        metrics, log = Tail(self._raw_metrics), Tail(self._log)
        self.last = time.monotonic()
        while True:
            ended = process.poll()
            for line in log.lines():
                self.state.padded(line)
            self._hear_of_pauses()
            for line in metrics.lines():
                self._step(json.loads(line))
            self._announce()
            if self._done():
                return None
            if ended is not None:
                return f"ended with code {ended}"
            if why := self._silent():
                return why
            time.sleep(_POLL_S)

    def _step(self, row: dict[str, Any]) -> None:
        step = int(row["step"])
        if step == (self.resume.step if self.resume else 0):
            self.state.validated(step)  # the validation before the first step
            return
        self.state.finish(step, {**numbers(row["data"]), **watch.not_finite(row["data"]), "search/paused_s": self._paused()})
        self.steps += 1
        self.last = time.monotonic()

    def _paused(self) -> float:
        """Return how long searching paused since the last step."""
        return self.pauses.seconds(time.time() - (time.monotonic() - self.last))

    def _hear_of_pauses(self) -> None:
        """Tell of pauses. Raises TrainingError when a worker gave the retriever up."""
        retriever, url = self.state.run.config.retriever, self.state.run.retriever_url
        for note in self.pauses.news():
            faults = ", ".join(f"{count} {fault}" for fault, count in note["faults"].items())
            failed = f"{sum(note['faults'].values())} of {note['searches']} recent searches failed ({faults})"
            if note["event"] == "gave_up":
                raise TrainingError(
                    f"{failed} and {url} was not well again within retriever.pause_max_s={retriever.pause_max_s:g}; "
                    f"repair the retriever and run the stage again, it goes on from its last checkpoint"
                )
            waits = f"paused: {failed}; waiting for {url}, at most {retriever.pause_max_s:g} s"
            self.state.say(waits if note["event"] == "paused" else "the retriever is well again; training goes on")

    def _announce(self) -> None:
        """Seal a checkpoint and tell the hooks, once verl's tracker (written after its files) names it and its step is recorded."""
        folder = self.state.run.paths.checkpoints
        step = _tracked(folder / "latest_checkpointed_iteration.txt")
        path = folder / f"global_step_{step}"
        if self.announced < step <= self.state.log.last and checkpoints.fault(path) is None:
            self.announced = step
            checkpoints.seal(path)
            checkpoints.prune(folder, self.state.run.config.train.keep_checkpoints)
            if self.state.uploader:
                self.state.uploader.offer(Checkpoint(step, path))
            self.state.hooks.on_checkpoint(step, path)

    def _done(self) -> bool:
        return self.announced >= self.state.run.config.train.steps and self.state.log.last >= self.state.run.config.train.steps

    def _silent(self) -> str | None:
        train = self.state.run.config.train
        name, limit = ("train.step_deadline_s", train.step_deadline_s) if self.steps else ("train.start_deadline_s", train.start_deadline_s)
        silence = time.monotonic() - self.last - self._paused()
        return f"made no step for {silence:.0f} s ({name}={limit:g}; raise it if steps really take longer)" if silence > limit else None


def _explain(run: Run, failures: Sequence[_Failure]) -> str:
    last = failures[-1]
    history = "; ".join(f"attempt {f.attempt} {f.why}" for f in failures)
    log = run.logs / f"attempt_{last.attempt}.log"
    first = _ERROR.search(log.read_text(errors="replace"))
    return (
        f"the trainer did not finish: {history} (train.max_attempts={run.config.train.max_attempts}, two in a row without a step end it). "
        f"{f'The first error was {first[1]!r}. ' if first else ''}The log {log} ends with:\n{last.tail}"
    )


def _make_folders(run: Run) -> None:
    for folder in (run.paths.work, run.rollouts, run.logs, run.paths.checkpoints, run.paths.episodes):
        folder.mkdir(parents=True, exist_ok=True)


def _write_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(path)


def _tracked(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def ray_folder(work: Path) -> Path:
    """Return Ray's private folder for a work folder: short, since a socket's path may have 107 bytes only."""
    return Path(tempfile.gettempdir()) / f"rr-{hashlib.sha256(str(work).encode()).hexdigest()[:10]}"
