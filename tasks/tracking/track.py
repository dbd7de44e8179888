"""Tracking off the critical path: events go to a journal on disk; a separate process (`sender`) passes them to MLflow.

Invariants: (1) no run waits for MLflow, and none fails because of it; (2) what MLflow missed stays in the journal and is
sent by the next run or by `python -m tasks.tracking.resend`; (3) this module never imports mlflow.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from research_rl.config import Config, load_profile, parameters
from research_rl.config.redact import HIDDEN, redact
from research_rl.errors import ConfigError, StorageError
from research_rl.paths import CHECKOUT, PYTHON
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Process, spawn
from research_rl.report.version import commit
from tasks.sqlite import sqlite_uri
from tasks.tracking.journal import Place, TrackingJournal

__all__ = ["FLOW", "NOTE", "StageRun", "Tracker", "changed", "flat", "journals", "reported", "run_name", "run_title", "tracking_uri"]

FLOW = "flow"
NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description."""
_DATA = "research-data"
"""The flow that trains nothing."""
_PARAM_CHARS = 500
_TAG_CHARS = 4000
# How long a run waits at its end for MLflow; what is then left is sent by the next run.
_DRAIN_S = 90.0
_KILLED_S = 5.0
PATIENCE_S = 20.0
_INDEX = "reported.json"
_DEFAULT_PAGE = "http://127.0.0.1:5000"
logger = logging.getLogger("prefect.tasks.track")


def tracking_uri(config: Config, workspace: Workspace) -> str:
    """Return the MLflow address: MLFLOW_TRACKING_URI, else tracking.mlflow_uri, else a sqlite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.mlflow_uri or sqlite_uri(workspace.root / "mlflow.db")


def journals(workspace: Workspace) -> Path:
    """Return the folder that holds one journal per run."""
    return workspace.work("tracking")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as dotted names; without credentials, cut to 500 characters (MLflow's limit on old servers)."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = redact(str(value))[:_PARAM_CHARS]
    return leaves


class StageRun:
    """The nested MLflow run of one stage; it comes into being with the first thing said about it.

    `key` tells it from all others of its journal, `name` is what MLflow's lists call it.
    """

    def __init__(self, tracker: Tracker, key: str, params: dict[str, str], parent: str = FLOW, name: str | None = None) -> None:
        self.tracker, self.key, self.params, self.parent = tracker, key, params, parent
        self.name = name or key.rpartition("/")[2]
        self.started = int(time.time() * 1000)
        self.begun = self.fresh = False
        self.manifest: Manifest | None = None

    def begin(self) -> None:
        """Make the run unless it is there."""
        if not self.begun:
            self.begun = True
            self.tracker.begun.add(self.key)
            self.tracker.journal.write("begin", key=self.key, parent=self.parent, name=self.name, start=self.started, params=self.params)

    def child(self, name: str, params: dict[str, str], key: str | None = None) -> StageRun:
        """Return a run nested in this one; two children are two runs where their `key` differs, their `name` without one."""
        self.begin()
        return StageRun(self.tracker, f"{self.key}/{key or name}", params, self.key, name)

    def finished(self, manifest: Manifest, built: bool) -> None:
        """Record what the stage left: counts as metrics, hashes as tags. A skipped stage leaves its lineage on the parent alone.

        Sets `fresh`: whether no run of this workspace has told MLflow about this artifact yet.
        """
        self.manifest, self.fresh = manifest, built or self.tracker.journal_of(manifest) is None
        self.tracker.tags(FLOW, {f"manifest.{self.key}": manifest.hash, f"stage.{self.key}": "built" if built else "cached"})
        if built:
            self.metrics({f"count/{name}": value for name, value in manifest.counts.items()})
            self.metrics({"seconds": (time.time() * 1000 - self.started) / 1000})
            self.tags({"manifest": manifest.hash, **{f"parent.{name}": value for name, value in manifest.parents.items()}})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step."""
        self.begin()
        self.tracker.journal.write("metrics", key=self.key, step=step, values=dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self.begin()
        self.tracker.tags(self.key, values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, below `folder` of the run's artifacts."""
        self.begin()
        self.tracker.journal.write("artifact", key=self.key, path=str(path), folder=folder)

    def traces(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log episodes as MLflow traces; see `sender` for the record's form."""
        self.begin()
        for record in records:
            self.tracker.journal.write("trace", key=self.key, record=dict(record))

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Log the evaluation of one question set among MLflow's datasets, prompts, logged models and evaluation runs.

        It is {"folder", "manifest", "judgements", "set", "traces", "metrics", "prompt": {"name", "text", "message"}, "model": {"name",
        "params", "tags"}}: the artifact's folder and hash, the folders of its judgements, the name of the question set, how many of
        its questions are shown as rows, numbers by name, the prompt template, and what makes the logged model the one it is.
        """
        self.begin()
        self.tracker.journal.write("evaluation", key=self.key, evaluation=dict(evaluation))

    def register(self, folder: Path, model: str, tags: Mapping[str, str]) -> None:
        """Upload a model folder and make it a version of `model` in the registry, under the alias candidate.

        The tag `manifest` names a version: an artifact that has one gets no second.
        """
        self.begin()
        self.tracker.journal.write("register", key=self.key, path=str(folder), model=model, tags=dict(tags))

    def describe(self, model: str, manifest: str, text: str, tags: Mapping[str, str]) -> None:
        """Give the version of an artifact a description and further tags."""
        self.begin()
        self.tracker.journal.write("describe", key=self.key, model=model, manifest=manifest, text=text, tags=dict(tags))

    def promote(self, model: str, manifest: str, met: str | None, who: str, why: str) -> None:
        """Make the version of an artifact champion, unless another is champion by then than the version `met` (None: there was none)."""
        self.begin()
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.tracker.journal.write("promote", key=self.key, model=model, manifest=manifest, met=met, who=who, when=when, why=why)

    def end(self, status: str) -> None:
        """End the run if it was ever begun."""
        if self.begun:
            self.tracker.journal.write("end", key=self.key, status=status)
            if self.manifest:
                self.tracker.remember(self.manifest)


class Tracker:
    """Writes the journal of one run and owns the sender."""

    def __init__(self, journal: TrackingJournal, sender: Process | None, uri: str) -> None:
        self.journal, self.sender, self.uri = journal, sender, uri
        self.begun = {FLOW}
        self._remembering = threading.Lock()

    @classmethod
    def start(cls, config: Config, workspace: Workspace, *, flow: str, run_id: str) -> Tracker:
        """Open a journal for this run and start the sender, which also sends what earlier runs left."""
        journal = TrackingJournal(journals(workspace) / f"{time.time_ns()}-{run_id[:8]}")
        uri = tracking_uri(config, workspace)
        tags = {"flow": flow, "profile": config.profile, "changed": changed(config), "prefect_flow_run_id": run_id, **_git()}
        journal.write(
            "open",
            name=run_title(flow, config),
            journal=journal.folder.name,
            experiment=config.tracking.experiment,
            # The journal is a file: the sender gets the address with its credentials by its environment.
            uri=redact(uri),
            artifacts=str(workspace.root / "mlartifacts"),
            tags=tags,
            params=flat(config.model_dump(mode="json")),
        )
        sender = spawn(
            "mlflow-sender",
            [
                PYTHON,
                "-m",
                "tasks.tracking.sender",
                "--live",
                journal.folder.name,
                "--patience",
                str(PATIENCE_S),
                str(journals(workspace)),
            ],
            folder=workspace.services,
            cwd=CHECKOUT,
            # Not an argument, which every user of the machine can read.
            env={"MLFLOW_TRACKING_URI": uri},
            log=journals(workspace) / "sender.log",
        )
        return cls(journal, sender, redact(uri))

    @contextmanager
    def stage(self, name: str, config: Config, sections: Sequence[str]) -> Generator[StageRun]:
        """Enclose one stage; an exception ends its run as FAILED with the reason as a tag."""
        run = StageRun(self, name, flat(parameters(config, sections)))
        try:
            yield run
        except BaseException as error:
            run.tags({"error": redact(f"{type(error).__name__}: {error}")[:_PARAM_CHARS]})
            # Cancellation and Ctrl-C are no Exception: the run was killed, the stage did not fail.
            run.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.end("FINISHED")

    def tags(self, key: str, values: Mapping[str, str]) -> None:
        """Set tags of the run `key`."""
        self.journal.write("tags", key=key, values=dict(values))

    def metrics(self, values: Mapping[str, float]) -> None:
        """Log metrics of the run as a whole."""
        self.journal.write("metrics", key=FLOW, step=0, values=dict(values))

    def journal_of(self, manifest: Manifest) -> Path | None:
        """Return the folder of the journal in which an artifact was reported."""
        name = self._index().get(f"{manifest.stage}:{manifest.hash}")
        return self.journal.folder.parent / name if name else None

    def remember(self, manifest: Manifest) -> None:
        """Note that this run reported an artifact; stages that end at one moment wait for each other.

        A disk that does not take the note costs a second report of the artifact, not the stage.
        """
        path = self.journal.folder.parent / _INDEX
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        # Stages of one run that end at once would each write the index without the other's artifact.
        with self._remembering:
            try:
                temporary.write_text(json.dumps({**self._index(), f"{manifest.stage}:{manifest.hash}": self.journal.folder.name}))
                temporary.replace(path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                logger.warning("%s does not take the note of what was reported: %s; free disk space", path, error.strerror)

    def _index(self) -> dict[str, str]:
        """Return the journals by artifact; none where the file is missing or damaged, which costs a second report of each artifact."""
        return reported(self.journal.folder.parent)

    def link(self, key: str = FLOW, manifest: Manifest | None = None, wait_s: float = 0.0) -> str | None:
        """Return the page of a run in MLflow's interface: of this run's `key`, else of the run that reported `manifest`.

        None when MLflow has not answered within `wait_s`.
        """
        place = self._place(key, manifest, wait_s)
        return place and f"{_page(place)}/#/experiments/{place.experiment}/runs/{place.runs[key]}"

    def comparison(self, artifacts: Sequence[Manifest]) -> str | None:
        """Return the page that compares the runs which reported `artifacts`; None when MLflow knows not all of them."""
        places = [(manifest.stage, self._place(manifest.stage, manifest, 0.0)) for manifest in artifacts]
        reported = [(place, place.runs[stage]) for stage, place in places if place]
        if len(reported) < len(places) or not reported:
            return None
        place = reported[0][0]
        query = {"runs": json.dumps([run for _, run in reported]), "experiments": json.dumps([place.experiment])}
        return f"{_page(place)}/#/compare-runs?{urlencode(query, quote_via=quote)}"

    def ask_standing(self, model: str) -> None:
        """Ask the registry who is champion; the sender has the answer by the time that `standing` looks for it."""
        self.journal.write("standing", key=FLOW, model=model)

    def standing(self, wait_s: float) -> dict[str, str] | None:
        """Return version and manifest of the champion as the registry answered to `ask_standing`, empty where there is none.

        None when it has not answered within `wait_s`, or cannot be reached now.
        """
        deadline = time.monotonic() + wait_s
        while (place := Place.load(self.journal.folder)).standing is None:
            gone = self.sender is None or self.sender.poll() is not None
            if gone or place.failure or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return place.standing

    def _place(self, key: str, manifest: Manifest | None, wait_s: float) -> Place | None:
        """Return the sender's place in the journal that reported `key`, once it has sent it; waits only for this run's own."""
        folder = self.journal.folder if key in self.begun else manifest and self.journal_of(manifest)
        if not folder:
            return None
        deadline = time.monotonic() + wait_s
        while (place := Place.load(folder)) and key not in place.runs:
            if time.monotonic() > deadline or self.sender is None or self.sender.poll() is not None:
                return None
            time.sleep(0.2)
        return place

    def close(self, status: str) -> bool:
        """End the run; wait until the sender is through or its deadline is over. Return whether everything was sent.

        A run that is being killed waits for seconds only: who kills it will not wait longer.
        """
        self.journal.write("close", status=status)
        if self.sender is None:
            return False
        deadline = time.monotonic() + (_KILLED_S if status == "KILLED" else _DRAIN_S)
        while self.sender.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        # Also when it ended by itself, which removes its pid file.
        self.sender.stop()
        place = Place.load(self.journal.folder)
        self._report(place)
        return place.done

    def _report(self, place: Place) -> None:
        """Say in the log what MLflow did not get, and why."""
        if not place.done:
            logger.warning(
                "MLflow at %s took not all events (%s); %s keeps them for the next run or `python -m tasks.tracking.resend`",
                self.uri,
                place.failure or "no answer in time",
                self.journal.folder,
            )
        if place.refused or self.journal.lost:
            logger.warning(
                "MLflow at %s refused %d events, see %s; the disk did not take %d",
                self.uri,
                place.refused,
                journals_log(self.journal.folder),
                self.journal.lost,
            )


def reported(folder: Path) -> dict[str, str]:
    """Return the journal in which each artifact was reported, by `stage:hash`, from the folder of journals."""
    path = folder / _INDEX
    if not path.exists():
        return {}
    try:
        return read_object(path, StorageError, "artifacts are reported once more, and the file is written anew")
    except StorageError as error:
        logger.warning("%s", error)
        return {}


def journals_log(folder: Path) -> Path:
    """Return the sender's log, beside the journals."""
    return folder.parent / "sender.log"


def run_name(flow: str, config: Config) -> str:
    """Return what a run is called in Prefect: flow, profile and the seed of what it makes, so that seeds can be told apart in the list."""
    return f"{flow} {config.profile} seed {_seed(flow, config)}"


def run_title(flow: str, config: Config) -> str:
    """Return what a run is called in MLflow's lists, where its time stands beside it: what it does, profile, steps and seed."""
    steps = "" if flow == _DATA else f" steps={config.train.steps}"
    return f"{flow.removeprefix('research-')} {config.profile}{steps} seed={_seed(flow, config)}"


def _seed(flow: str, config: Config) -> int:
    return config.data_seed if flow == _DATA else config.train_seed


def changed(config: Config) -> str:
    """Return the parameters that differ from the profile's, as `name=value` in one line; "nothing" when all are the profile's."""
    try:
        profile = flat(load_profile(config.profile).model_dump(mode="json"))
    except ConfigError:  # params.yaml outlives the profile that it came from
        return f"profile {config.profile} is unknown here"
    differences = {name: value for name, value in flat(config.model_dump(mode="json")).items() if profile.get(name) != value}
    return redact(", ".join(f"{name}={value}" for name, value in differences.items()) or "nothing")[:_TAG_CHARS]


def _page(place: Place) -> str:
    """Return where MLflow's interface shows what was sent: the server itself, or that of `make up` for a sqlite file."""
    return place.uri.replace(f"{HIDDEN}@", "") if place.uri.startswith("http") else _DEFAULT_PAGE


def _git() -> dict[str, str]:
    """Return commit and state of the checkout; nothing where there is no git."""
    checkout = commit()
    return {"git_commit": checkout.hash, "git_changed": str(checkout.changed).lower()} if checkout else {}
