"""The supervisor against a trainer that misbehaves on purpose: a program that writes verl's files and then hangs, dies or lies.

What verl itself writes is held by the contract tests; here the subject is what the supervisor does about it.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from research_rl.config import Config
from research_rl.errors import CollapseError, ConfigError, ServiceError, TrainingError
from research_rl.retriever.source import Taping
from research_rl.training.run import attempt, checkpoints
from research_rl.training.run import run as module
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.launch import RayJobs
from research_rl.training.run.overrides import Paths
from research_rl.training.run.run import Run, TrainHooks
from research_rl.training.run.supervise import supervise
from research_rl.training.run.watch import Finding
from tests.training import sections
from tests.waiting import ended

TRAINER = r"""
import json, os, pickle, re, subprocess, sys, time, zipfile, struct
from pathlib import Path

options = dict(item.lstrip("+").split("=", 1) for item in sys.argv[3:])
value = lambda name: options[name].strip("'")
work = Path.cwd()
plan = json.loads((work / "plan.json").read_text())
attempt = len(list((work / "logs").glob("attempt_*.log")))
script = plan[min(attempt, len(plan)) - 1]
checkpoints = Path(value("trainer.default_local_dir"))
resume = options["trainer.resume_from_path"]
step = 0 if resume == "null" else int(resume.strip("'").rsplit("_", 1)[1])
print("resuming from", step, flush=True)
print(script.get("say", ""), flush=True)
time.sleep(script.get("start_s", 0))

def save(step, whole=True):
    path = checkpoints / f"global_step_{step}"
    (path / "actor/huggingface").mkdir(parents=True, exist_ok=True)
    (path / "actor/fsdp_config.json").write_text('{"world_size": 1}')
    for part in ("model", "optim", "extra_state"):
        with zipfile.ZipFile(path / f"actor/{part}_world_size_1_rank_0.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps("x" * 100))
    (path / "actor/huggingface/config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (path / "actor/huggingface/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    if not whole:
        return
    with zipfile.ZipFile(path / "data.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps("x"))
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))

def episode(step, index, stop):
    row = {"id": f"q{index}", "uid": "u", "rollout": index, "score": float(index % 2), "f1": 0.0, "em": 0.0, "format_ok": True,
           "prompt_tokens": 1, "model_tokens": 1, "result_tokens": 0, "engine_seconds": 0.0, "search_seconds": 0.0, "stop": stop,
           "error": "EngineDeadError: gone" if stop == "engine_failure" else None, "attempt": attempt,
           "searches": [{"query": "q", "passage_ids": [], "seconds": 0.1, **script.get("fault", {"error": None, "fault": None})}]}
    folder = work / f"episodes/train/{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{os.getpid()}.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")

metrics = open(os.environ["VERL_FILE_LOGGER_PATH"], "wb", buffering=0)
for step in range(step + 1, int(options["trainer.total_training_steps"]) + 1):
    for note in script.get("notes", []) if step == 2 else []:
        folder = work / "pauses"
        folder.mkdir(exist_ok=True)
        line = {"event": note, "at": time.time(), "faults": {"timeout": 8}, "searches": 9}
        with open(folder / "worker.jsonl", "a") as stream:
            stream.write(json.dumps(line) + "\n")
        time.sleep(script.get("pause_s", 0) * (note == "paused"))
    while step == script.get("until_sealing") and not (work / "sealing").exists():
        time.sleep(0.02)
    while script.get("told_of") and step > 1 and not (work / f"checkpoint_{step - 1}").exists():
        time.sleep(0.02)
    if step == script.get("lacks"):
        (work / "missing").mkdir()
        (work / "missing/worker.jsonl").write_text('{"query": "who", "top_k": 3}\n{"query": "where", "top_k": 3}\n')
    for index in range(script.get("rows", 4)):
        episode(step, index, script.get("stop", "answered"))
    if step == script.get("hang"):
        # A grandchild in its own session, as Ray's daemons are.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (work / "grandchild").write_text(str(child.pid))
        time.sleep(600)
    if step == script.get("die_saving"):
        save(step, whole=False)
        sys.exit(3)
    if step % script.get("save_every", 1) == 0:
        save(step)
    if step == script.get("die_saved"):
        sys.exit(4)
    if script.get("padding"):
        lost = script["padding"]
        print(f"INFO: Upsampled batch from {4 - lost} to 4 with {lost} synthetic padding samples for required_multiple=4", flush=True)
        time.sleep(0.6)
    broken = {"actor/grad_norm": None} if script.get("nan_from", 99) <= step <= script.get("nan_to", 99) else {}
    metrics.write(json.dumps({"step": step, "data": {"loss": step / 10, "attempt": attempt, "bad": None, **broken}}).encode() + b"\n")
    time.sleep(script.get("pause", 0.05))
if script.get("code"):
    print("ValueError: the model cannot be read", flush=True)
    sys.exit(script["code"])
time.sleep(600)
"""


class Listener(TrainHooks):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rollouts: list[int] = []
        self.checkpoints: list[int] = []
        self.findings: list[tuple[str, int, bool]] = []

    def on_finding(self, finding: Finding, kept: Checkpoint | None) -> None:
        self.findings.append((finding.rule, finding.step, finding.stops))

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def on_rollouts(self, step: int, path: Path) -> None:
        assert path.is_file()
        self.rollouts.append(step)

    def on_checkpoint(self, step: int, path: Path) -> None:
        assert path.is_dir()
        self.checkpoints.append(step)


class Telling(Listener):
    """Lets a trainer with `told_of` begin a step once the checkpoint of the one before it is whole, however long that takes."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._work = run.paths.work

    def on_checkpoint(self, step: int, path: Path) -> None:
        super().on_checkpoint(step, path)
        (self._work / f"checkpoint_{step}").touch()


def make_run(folder: Path, plan: list[dict[str, Any]], **values: Any) -> Run:
    work = folder / "work"
    work.mkdir(parents=True)
    (work / "plan.json").write_text(json.dumps(plan))
    trainer = folder / "trainer.py"
    trainer.write_text(TRAINER)
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {trainer} "$@"\n')
    interpreter.chmod(0o755)
    sizes = {"steps": 4, "prompts_per_step": 2, "rollouts_per_prompt": 2}
    limits = {"start_deadline_s": 600.0, "step_deadline_s": 600.0, "max_attempts": 3}
    config = Config.model_validate({**sections(**{**sizes, **limits, **values}), "environments": {"policy": str(interpreter)}})
    paths = Paths(folder, folder / "train.parquet", folder / "dev.parquet", work, folder / "ray")
    return Run(config, paths, folder / "services", "http://127.0.0.1:9")


def read_metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def ignore(text: str, share: float) -> None: ...


def test_every_step_is_told_once_and_kept(tmp_path: Path) -> None:
    run, listener = make_run(tmp_path, [{}]), Listener()
    outcome = supervise(run, listener, ignore)
    assert (outcome.checkpoint.step, outcome.attempts, outcome.lost) == (4, 1, 0)
    assert listener.steps == listener.rollouts == [1, 2, 3, 4]
    assert listener.checkpoints[-1] == 4
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["metrics"]["loss"] == 0.3 and rows[2]["metrics"]["episode/reward"] == 0.5
    assert "bad" not in rows[2]["metrics"]
    assert len(gzip.decompress((run.rollouts / "000003.jsonl.gz").read_bytes()).splitlines()) == 4
    assert len(list(run.paths.checkpoints.glob("global_step_*"))) == run.config.trainer.keep_checkpoints


def test_a_trainer_that_takes_long_to_start_is_told_of_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to three minutes of silence looked as if nothing happened."""
    monkeypatch.setattr(attempt, "_TELL_S", 0.3)
    said: list[str] = []
    say = "\x1b[36m(pid=7)\x1b[0m Loading checkpoint shards"
    supervise(make_run(tmp_path, [{"say": say, "start_s": 2.0}]), TrainHooks(), lambda text, share: said.append(text))
    starting = [text for text in said if text.startswith("the trainer starts, ")]
    assert len(starting) >= 3
    assert starting[-1].endswith(" s of at most 600 s; its log: (pid=7) Loading checkpoint shards")
    first = next(place for place, text in enumerate(said) if text.startswith("step 1 of 4"))
    assert not any(text.startswith("the trainer starts") for text in said[first:]), "from the first step on the steps are told"


def test_a_silent_trainer_is_ended_with_all_it_started_and_resumed(tmp_path: Path) -> None:
    run, listener = make_run(tmp_path, [{"hang": 3}, {}], step_deadline_s=4.0), Listener()
    outcome = supervise(run, listener, ignore)
    assert outcome.attempts == 2 and outcome.checkpoint.step == 4
    assert listener.steps == [1, 2, 3, 4]
    assert ended(int((run.paths.work / "grandchild").read_text()))
    assert [row["metrics"]["attempt"] for row in read_metrics(run)] == [1, 1, 2, 2]
    redone = gzip.decompress((run.rollouts / "000003.jsonl.gz").read_bytes()).splitlines()
    assert {json.loads(line)["attempt"] for line in redone} == {2}


def test_a_checkpoint_cut_by_death_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"die_saving": 3}, {}])
    assert supervise(run, TrainHooks(), ignore).attempts == 2
    assert "resuming from 2" in (run.logs / "attempt_2.log").read_text()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_saved_but_not_logged_is_done_again(tmp_path: Path, step: int) -> None:
    run, listener = make_run(tmp_path, [{"die_saved": step}, {}]), Listener()
    supervise(run, listener, ignore)
    assert f"resuming from {step - 1}" in (run.logs / "attempt_2.log").read_text()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == listener.steps == [1, 2, 3, 4]
    assert all("loss" in row["metrics"] for row in rows) and rows[step - 1]["metrics"]["attempt"] == 2


def test_a_step_saved_but_not_logged_is_kept_where_more_than_it_would_be_done_again(tmp_path: Path) -> None:
    run, listener = make_run(tmp_path, [{"die_saved": 2, "save_every": 2}, {"save_every": 2}]), Listener()
    supervise(run, listener, ignore)
    assert "resuming from 2" in (run.logs / "attempt_2.log").read_text()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == listener.steps == [1, 2, 3, 4]
    assert "loss" not in rows[1]["metrics"] and rows[1]["metrics"]["episode/reward"] == 0.5


def test_a_new_process_goes_on_and_tells_the_kept_steps_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{}], steps=2)
    supervise(run, TrainHooks(), ignore)
    longer = Run(run.config.model_copy(update={"train": run.config.train.model_copy(update={"steps": 3})}), run.paths, run.services, "u")
    listener, said = Listener(), list[str]()
    assert supervise(longer, listener, lambda text, share: said.append(text)).checkpoint.step == 3
    assert listener.steps == [1, 2, 3]
    # Told as progress, all of an hour's steps in one moment would be the rate from which the time left is reckoned.
    assert said[0] == "step 2 of 3 stands from an earlier start"
    assert [text for text in said if text.startswith(("step 1", "step 2"))] == said[:1]
    assert "resuming from 2" in (run.logs / "attempt_2.log").read_text()


def test_nothing_is_started_when_all_steps_are_done(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{}], steps=1)
    supervise(run, TrainHooks(), ignore)
    assert supervise(run, TrainHooks(), ignore).attempts == 1


def test_failing_twice_without_a_step_ends_with_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"die_saving": 1}], max_attempts=5)
    with pytest.raises(TrainingError, match=r"attempt 2 ended with code 3[^$]*max_attempts=5") as caught:
        supervise(run, TrainHooks(), ignore)
    assert "resuming from 0" in str(caught.value)
    assert not list((tmp_path / "services").glob("*.pid"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"padding": 1, "pause": 5}, "1 of 4 trajectories of a step were lost.*padding"),
        ({"stop": "engine_failure"}, "4 of 4 trajectories.*EngineDeadError: gone"),
        ({"rows": 3}, "1 of 4 trajectories of a step were lost.*left no record"),
        ({"fault": {"error": None, "fault": "garbage"}}, "4 of 4 searches of step 1 failed.*'garbage'"),
        ({"notes": ["paused", "gave_up"]}, r"8 of 9 recent searches failed \(8 timeout\).*retriever\.pause_max_s=600"),
        (
            {"fault": {"error": "retriever cannot be reached", "fault": "unreachable"}},
            "4 of 4 searches of step 1 failed.*cannot be reached",
        ),
    ],
)
def test_training_on_what_is_left_is_refused(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        supervise(make_run(tmp_path, [plan]), TrainHooks(), ignore)


def test_a_step_that_a_replayed_tape_could_not_serve_is_no_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"lacks": 3, "told_of": True}])
    listener = Telling(run)
    taping = Taping(tmp_path / "tape" / "searches.sqlite", None, run.paths.work / "missing")
    with pytest.raises(TrainingError, match=r"2 searches are not on the tape .*'who' \(3 passages\).*tape=record.*last checkpoint"):
        supervise(replace(run, taping=taping), listener, ignore)
    assert listener.steps == [1, 2]


def test_a_pause_is_told_measured_and_no_silence(tmp_path: Path) -> None:
    said: list[str] = []
    run = make_run(tmp_path, [{"notes": ["paused", "resumed"], "pause_s": 5.0}], step_deadline_s=4.0)
    outcome = supervise(run, TrainHooks(), lambda text, share: said.append(text))
    assert outcome.attempts == 1
    paused = [row["metrics"]["search/paused_s"] for row in read_metrics(run)]
    began, ended = (json.loads(line)["at"] for line in (run.paths.work / "pauses" / "worker.jsonl").read_text().splitlines())
    assert sum(paused) == pytest.approx(ended - began, abs=0.01) and ended - began >= 5.0 and paused[3] == 0
    told = [text for text in said if "paused" in text or "goes on" in text]
    assert told[0].startswith("paused: 8 of 9 recent searches failed (8 timeout)") and told[1].endswith("training goes on")


def test_a_collapse_warns_then_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"nan_from": 4, "told_of": True, "pause": 0.3}], steps=20, keep_checkpoints=1)
    listener = Telling(run)
    with pytest.raises(
        CollapseError, match=r"step 6: nan: .*\(actor/grad_norm\).*since step 4.*train\.steps=3 publishes it.*watch\.nan\.action=warn"
    ):
        supervise(run, listener, ignore)
    assert listener.findings == [("nan", 4, False), ("nan", 6, True)]
    assert [row["metrics"]["watch/nan"] for row in read_metrics(run)] == [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]
    assert json.loads((run.paths.work / "good/good.json").read_text())["step"] == 3
    assert not list((tmp_path / "services").glob("*.pid"))
    published = supervise(altered(run, steps=3), TrainHooks(), ignore)
    assert published.checkpoint.step == 3 and published.attempts == 1, "the last good checkpoint is published without training"


def test_a_stopped_run_goes_on_with_its_rule_relaxed(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"nan_from": 2, "pause": 1.0}, {}], steps=6)
    with pytest.raises(CollapseError):
        supervise(run, TrainHooks(), ignore)
    relaxed = run.config.watch.model_copy(update={"nan": run.config.watch.nan.model_copy(update={"action": "ignore"})})
    outcome = supervise(Run(run.config.model_copy(update={"watch": relaxed}), run.paths, run.services, "u"), TrainHooks(), ignore)
    assert outcome.checkpoint.step == 6 and outcome.attempts == 2
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_breach_that_passes_leaves_nothing_kept(tmp_path: Path) -> None:
    run, listener = make_run(tmp_path, [{"nan_from": 2, "nan_to": 3}], steps=5), Listener()
    assert supervise(run, listener, ignore).checkpoint.step == 5
    assert listener.findings == [("nan", 2, False)] and not (run.paths.work / "good").exists()


def altered(run: Run, **values: Any) -> Run:
    parts = {name: getattr(run.config, name).model_copy(update=part) for name, part in sections(**values).items()}
    return Run(run.config.model_copy(update=parts), run.paths, run.services, "u")


PATIENT = {"start_deadline_s": 300.0, "step_deadline_s": 300.0}


def kept(run: Run) -> dict[str, int]:
    """Return the files of checkpoints and rollouts with their sizes, without the seals."""
    files = (path for folder in (run.paths.checkpoints, run.rollouts) for path in folder.rglob("*"))
    return {str(path): path.stat().st_size for path in files if path.is_file() and path.name != checkpoints.SEAL}


def test_fewer_steps_publish_the_checkpoint_of_that_step_and_remove_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{}], steps=6, keep_checkpoints=4, **PATIENT)
    supervise(run, TrainHooks(), ignore)
    before, metrics, said, listener = kept(run), read_metrics(run), list[str](), Listener()
    outcome = supervise(altered(run, steps=4, keep_checkpoints=1), listener, lambda text, share: said.append(text))
    assert (outcome.checkpoint.step, outcome.attempts) == (4, 1), "nothing was trained"
    assert listener.steps == [1, 2, 3, 4]
    assert kept(run) == before and read_metrics(run) == metrics, "what was trained after step 4 is still there"
    assert "step 4 is taken from a run of 6 steps" in said[-1]
    longer = supervise(altered(run, steps=7), TrainHooks(), ignore)
    assert (longer.checkpoint.step, longer.attempts) == (7, 2), "more steps go on from the sixth"


def test_fewer_steps_without_a_checkpoint_of_that_step_are_refused_and_remove_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{}], steps=6, keep_checkpoints=2, **PATIENT)
    supervise(run, TrainHooks(), ignore)
    before, metrics = kept(run), read_metrics(run)
    with pytest.raises(TrainingError, match=r"train\.steps=3: .*trained to step 6 .*only of 5, 6; .*--force"):
        supervise(altered(run, steps=3), TrainHooks(), ignore)
    assert kept(run) == before and read_metrics(run) == metrics


def test_a_seal_that_takes_longer_than_a_step_may_does_not_end_a_healthy_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint's seal waits until the trainer has gone on for longer than `step_deadline_s`, as a large model's does."""
    run, listener = make_run(tmp_path, [{"pause": 0.3, "until_sealing": 2}], steps=8, **{**PATIENT, "step_deadline_s": 10.0}), Listener()
    hashed, seals = checkpoints.file_sha256, list[float]()

    def slowly(path: Path) -> str:
        if not seals:
            seals.append(time.monotonic())
            (run.paths.work / "sealing").touch()
            while time.monotonic() - seals[0] < 1.3 * 10.0 or not (run.paths.checkpoints / "global_step_6").is_dir():
                time.sleep(0.02)
        return hashed(path)

    monkeypatch.setattr(checkpoints, "file_sha256", slowly)
    outcome = supervise(run, listener, ignore)
    assert (outcome.attempts, outcome.checkpoint.step) == (1, 8)
    assert listener.steps == [1, 2, 3, 4, 5, 6, 7, 8] and listener.checkpoints[0] == 1 and listener.checkpoints[-1] == 8


def test_a_failing_listener_stops_the_trainer(tmp_path: Path) -> None:
    class Broken(TrainHooks):
        def on_step(self, step: int, metrics: dict[str, float]) -> None:
            raise RuntimeError("tracking is down")

    run = make_run(tmp_path, [{"pause": 30}])
    with pytest.raises(RuntimeError, match="tracking is down"):
        supervise(run, Broken(), ignore)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or []) and p.pid != os.getpid()]


def test_the_first_error_is_found_in_a_workers_line(tmp_path: Path) -> None:
    line = "\x1b[36m(AgentLoopWorkerTQ pid=7)\x1b[0m research_rl.errors.ConfigError: the prompt has 9 tokens"
    run = make_run(tmp_path, [{"say": line, "die_saving": 1}])
    with pytest.raises(TrainingError, match=r"first error was 'research_rl\.errors\.ConfigError: the prompt has 9 tokens'"):
        supervise(run, TrainHooks(), ignore)


def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    config = Config.model_validate({"environments": {"policy": str(tmp_path / "none")}})
    with pytest.raises(TrainingError, match=r"environments\.policy=.*make setup"):
        module.interpreter(config)


def test_rays_folder_is_short_enough_for_a_socket() -> None:
    folder = module.ray_folder(Path("/" + "long/" * 60))
    assert len(str(folder)) < 40


def test_rays_folder_lies_below_one_that_its_owner_alone_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its own folder mode 0777 under a name that everybody can tell."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        own = module.ray_folder(Path("/work")).parent
    finally:
        os.umask(before)
    assert own.parent == tmp_path and stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)
    assert module.ray_folder(Path("/other")).parent == own and stat.S_IMODE(own.stat().st_mode) == 0o700
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServiceError, match=rf"{own} is not a folder of user {os.getuid()} .*set TMPDIR to a folder of your own"):
        module.ray_folder(Path("/work"))


def test_a_token_of_the_cluster_that_no_header_can_carry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a\nb")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN has the character U\+000A at position 1"):
        RayJobs("http://127.0.0.1:9")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*none: No such file"):
        RayJobs("http://127.0.0.1:9")
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert RayJobs("http://127.0.0.1:9").client.headers["Authorization"] == "Bearer abc"
