"""Pass journals on to MLflow; runs as its own process beside a flow. Knows events and MLflow; knows no stage.

Invariants: (1) an event is marked sent only after MLflow took it; (2) an event that MLflow refuses is logged, counted and
skipped, one that it cannot be asked about is tried again, and a journal whose run MLflow refuses to open is kept; (3) a run whose flow
died is ended as KILLED; (4) a deleted experiment is restored, or made anew with all of the journal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from research_rl.config.redact import redact
from research_rl.terminal import guard_logs
from tasks.settings import sign_in
from tasks.tracking.experiment import dress
from tasks.tracking.journal import Place, read

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.exceptions import MlflowException

__all__ = ["CLIENT", "RefusedEvent", "Unreachable", "main", "metric_name", "reaching", "send_all"]

FLOW = "flow"
_JOURNAL = "research.journal"
# A login that is refused may be accepted once the key is corrected; no event is given up for it.
_LOGIN = (401, 407)
CLIENT = {
    # Trying again is done here, where the journal keeps the place; MLflow's own tries would block for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Spans of many traces go out in one request, where each took one of its own; none is dropped before the traces are waited for.
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE": "65536",
    # MLflow sends every five seconds what is there, which on a busy machine makes many requests of one; we ask for it when all is there.
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "600000",
    # One after the other: requests of several threads at once wait for each other in sqlite.
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment of a process with a client of MLflow, where the caller set nothing else."""
_CHARS = 300
_POLL_S = 0.3
_LONGEST_WAIT_S = 10.0
_BATCH = 1000
_TOGETHER = ("metrics", "tags", "trace")
"""Kinds of events of which those of one run go out together."""
_ORDER = ("artifact", *_TOGETHER)
"""Kinds of events that do not wait for each other, as they are sent: what most likely fails first, what is deleted by another try last."""
_WINDOW = 100
"""As many of them are sent before the place is kept."""
logger = logging.getLogger("sender")

Event = Mapping[str, Any]
_T = TypeVar("_T")


def metric_name(name: str) -> str:
    """Return `name` with what MLflow does not allow in names replaced by underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def send_all(folder: Path, live: str | None, patience_s: float = 0.0) -> int:
    """Send every unfinished journal below `folder`, oldest first, then follow `live` until it is closed.

    A silent MLflow is waited for while `live` is open and for at least `patience_s` in all. Return 1 if some is left.
    """
    unsent = 0
    for path in sorted(item for item in folder.iterdir() if item.is_dir() and item.name != live):
        if not Place.load(path).done:
            unsent += not _Sender(path, 0.0, live=False).run()
    if live:
        unsent += not _Sender(folder / live, patience_s, live=True).run()
    return int(unsent > 0)


class _Sender:
    """Sends one journal."""

    def __init__(self, folder: Path, patience_s: float, *, live: bool) -> None:
        self.folder, self.patience_s, self.live = folder, patience_s, live
        self.place = Place.load(folder)
        self.client: MlflowClient | None = None
        self.closed = False
        self.retrying = True
        """Whether the next group may have been sent before, by a try whose reply was lost or a sender that was killed."""

    def run(self) -> bool:
        """Send until the journal is closed (a live one) or at its end; return whether all of it went out."""
        failing_since: float | None = None
        wait = 1.0
        while True:
            events = read(self.folder, self.place.offset)
            self.closed = self.closed or any(event["op"] == "close" for _, event in events)
            if not events:
                if self.closed or not self.live:
                    return self._finish()
                time.sleep(_POLL_S)
                continue
            before = self.place.offset
            try:
                self._send(events)
                failing_since, wait = None, 1.0
            except Unreachable as error:
                self._note(error)
                if failing_since is None or self.place.offset > before:
                    failing_since, wait = time.monotonic(), 1.0
                # While the flow runs there is time to wait; after it the sender holds up its end.
                if (self.closed or not self.live) and time.monotonic() - failing_since >= self.patience_s:
                    return False
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def _note(self, error: Unreachable) -> None:
        """Say why nothing goes out, in the log and beside the journal."""
        self.retrying = True
        self.place.failure = str(error)
        self.place.save(self.folder)
        logger.warning("events are kept: %s", error)

    def _send(self, events: Sequence[tuple[int, Event]]) -> None:
        for window in _windows(events):
            self._send_window([event for _, event in window])
            # After MLflow took all of it: a sender that is killed before sends it again, and nothing is lost.
            self.place.offset, self.place.failure, self.place.traces = window[-1][0], "", []
            self.place.save(self.folder)
            self.retrying = False

    def _send_window(self, events: Sequence[Event]) -> None:
        refused = self.place.refused
        try:
            self._remove_begun()
            for group in _groups(events):
                self._reach(group)
        except Unreachable:
            # The next try refuses them once more.
            self.place.refused = refused
            raise

    def _reach(self, events: Sequence[Event]) -> None:
        """Deliver events that go out in one request; what MLflow refuses is logged, counted and passed over.

        Raises Unreachable for what is worth another try: no answer, a refused login, a run that cannot be opened, and a deleted
        experiment, which is restored first.
        """
        try:
            reaching(lambda: self._deliver(events))
        except (_UnknownRun, RefusedEvent) as error:
            if len(events) > 1:
                self._reach_each(events)
            elif isinstance(error, _UnknownRun):
                self._refuse(events[0], f"its run {error} was never opened")
            else:
                self._decide(events[0], error)

    def _reach_each(self, events: Sequence[Event]) -> None:
        """Deliver events one by one: of those that were refused together, MLflow may take all but one."""
        if events[0]["op"] == "trace":
            self._remove_begun()
        for event in events:
            self._reach([event])

    def _decide(self, event: Event, error: RefusedEvent) -> None:
        """Pass over an event that MLflow refused. Raises Unreachable where another try may help."""
        if event["op"] == "open" or error.status in _LOGIN:
            raise Unreachable(f"MLflow refused to open the run: {error}" if event["op"] == "open" else str(error)) from error
        # MLflow answers for runs of a deleted experiment as if the event were wrong.
        if self._revived():
            raise Unreachable(f"the experiment was deleted and is restored: {error}") from error
        self._refuse(event, str(error))

    def _refuse(self, event: Event, why: str) -> None:
        self.place.refused += 1
        logger.error("an event (%s) is not sent: %s", event["op"], why)

    def _revived(self) -> bool:
        """Bring back the experiment that the journal's runs belong to; return whether it had been deleted.

        One that is gone for good cannot come back: the journal is then sent from its start, into a new one.
        """
        if not self.place.experiment:
            return False
        try:
            return reaching(lambda: _restored(self._client(), self.place.experiment))
        except RefusedEvent as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                return False
            logger.warning("experiment %s is gone; the journal is sent from its start", self.place.experiment)
            self.place = Place(refused=self.place.refused)
            return True

    def _deliver(self, events: Sequence[Event]) -> None:
        operation = events[0]["op"]
        getattr(self, f"_on_{operation}")(events if operation in _TOGETHER else events[0])

    def _remove_begun(self) -> None:
        """Delete the traces that an earlier try left half done, of which some have no name yet by which they could be found."""
        from tasks.tracking import traces

        if not self.place.traces:
            return
        try:
            reaching(lambda: traces.remove(self._client(), self.place.experiment, self.place.traces))
        except RefusedEvent as error:
            logger.warning("what a failed try made of a trace stays: %s", error)
        self.place.traces = []

    def _on_open(self, event: Event) -> None:
        from mlflow import MlflowClient

        self.place.uri = _address(str(event["uri"]))
        sign_in(self.place.uri)
        self.client = MlflowClient(tracking_uri=self.place.uri)
        self.place.experiment = _experiment(self.client, str(event["experiment"]), str(event["artifacts"]))
        self._begin(FLOW, event, str(event["name"]), event["time"], event["tags"], None)

    def _on_begin(self, event: Event) -> None:
        self._begin(event["key"], event, str(event["name"]), event["start"], {}, event["parent"])

    def _begin(self, key: str, event: Event, name: str, start: int, tags: Mapping[str, str], parent: str | None) -> None:
        from mlflow.entities import Param

        run_tags = {**tags, "mlflow.runName": name, "mlflow.source.name": "research-rl", _JOURNAL: f"{self.folder.name}/{key}"}
        if parent:
            run_tags["mlflow.parentRunId"] = self._known(parent)
        if key not in self.place.runs:
            self.place.runs[key] = self._made(run_tags[_JOURNAL]) or self._create(start, run_tags)
        params = [Param(name, value) for name, value in event["params"].items()]
        # MLflow takes 100 parameters in one request, and 1,000 metrics.
        for first in range(0, len(params), 100):
            self._client().log_batch(self.place.runs[key], params=params[first : first + 100])

    def _create(self, start: int, tags: Mapping[str, str]) -> str:
        return self._client().create_run(self.place.experiment, start_time=start, tags=dict(tags)).info.run_id

    def _made(self, journal: str) -> str | None:
        """Return the run that an earlier try made and whose reply was lost; only a retried event looks for one."""
        if not (self.retrying or self.place.doubted):
            return None
        runs = self._client().search_runs([self.place.experiment], f"tags.`{_JOURNAL}` = '{journal}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _on_metrics(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(metric_name(name), float(value), int(event["time"]), int(event["step"]))
            for event in events
            for name, value in event["values"].items()
            if isinstance(value, int | float)
        ]
        for first in range(0, len(metrics), _BATCH):
            self._client().log_batch(self._run(events[0]), metrics=metrics[first : first + _BATCH])

    def _on_tags(self, events: Sequence[Event]) -> None:
        from mlflow.entities import RunTag

        # The last value of a tag stands.
        values = {name: str(value) for event in events for name, value in event["values"].items()}
        self._client().log_batch(self._run(events[0]), tags=[RunTag(name, value) for name, value in values.items()])

    def _on_artifact(self, event: Event) -> None:
        path = Path(event["path"])
        if path.is_dir():
            self._client().log_artifacts(self._run(event), str(path), event["folder"] or None)
        elif path.is_file():
            self._client().log_artifact(self._run(event), str(path), event["folder"] or None)
        else:
            logger.warning("%s is gone; it is not uploaded", path)

    def _on_trace(self, events: Sequence[Event]) -> None:
        from tasks.tracking import traces

        client, doubted = self._client(), self.place.doubted
        episodes = [
            traces.Episode(traces.Target(*self._where(event)), event["record"], int(event["time"]), self._name(event)) for event in events
        ]
        traces.log_traces([item for item in episodes if not (doubted and traces.standing(client, self.place.experiment, item.event))])

    def _where(self, event: Event) -> tuple[str, str, str, Callable[[str], None]]:
        """Return where the traces of an event go: the fields of `Target`."""
        return _address(self.place.uri), self.place.experiment, self._run(event), self._begun

    def _begun(self, trace: str) -> None:
        """Note a trace before any part of it is sent."""
        self.place.traces.append(trace)
        self.place.save(self.folder)

    def _on_verdict(self, event: Event) -> None:
        from tasks.tracking import traces

        traces.log_verdict(self._client(), traces.Target(*self._where(event)), event)

    def _on_evaluation(self, event: Event) -> None:
        from tasks.tracking import evaluations

        to = evaluations.Sent(*self._where(event), self._client(), int(event["time"]), self._name(event))
        evaluations.send(to, event["evaluation"])

    def _on_judged(self, event: Event) -> None:
        from tasks.tracking import evaluations

        place = Place.load(self.folder.parent / str(event["told"]))
        where = _address(self.place.uri), place.experiment or self.place.experiment, "", self._begun
        if not evaluations.judged(evaluations.Sent(*where, self._client(), int(event["time"]), self._name(event)), event):
            if not place.done:
                raise Unreachable(f"evaluation {str(event['evaluation'])[:12]} is not in MLflow yet, and its verdicts wait for it")
            logger.warning("MLflow has no rows of evaluation %s; the verdicts on it are not sent", str(event["evaluation"])[:12])

    def _name(self, event: Event) -> str:
        """Return the name of an event, the same each time it is sent and unlike that of any other."""
        content = json.dumps([self.folder.name, event], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _on_register(self, event: Event) -> None:
        from tasks.tracking import registry

        registry.register(self._client(), self._run(event), event["model"], Path(event["path"]), event["tags"])

    def _on_describe(self, event: Event) -> None:
        from tasks.tracking import registry

        registry.describe(self._client(), event["model"], event["manifest"], event["text"], event["tags"])

    def _on_standing(self, event: Event) -> None:
        from tasks.tracking import registry

        version = registry.champion(self._client(), event["model"])
        record = {"version": version.version, "manifest": version.tags.get(registry.MANIFEST, "")} if version else {}
        self.place.standing = {name: str(value) for name, value in record.items()}

    def _on_promote(self, event: Event) -> None:
        from tasks.tracking import registry

        why = registry.Reason(registry.GATE, event["who"], event["why"], event["when"])
        registry.promote(self._client(), event["model"], event["manifest"], event["met"], why)

    def _on_end(self, event: Event) -> None:
        self._client().set_terminated(self._run(event), event["status"], int(event["time"]))

    def _on_close(self, event: Event) -> None:
        self._client().set_terminated(self._known(FLOW), event["status"], int(event["time"]))

    def _run(self, event: Event) -> str:
        return self._known(event["key"])

    def _known(self, key: str) -> str:
        """Return the id of a run. Raises _UnknownRun when the event that opens it was lost or refused."""
        if key not in self.place.runs:
            raise _UnknownRun(key)
        return self.place.runs[key]

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        if self.client is None:
            sign_in(_address(self.place.uri))
            self.client = MlflowClient(tracking_uri=_address(self.place.uri))
        return self.client

    def _finish(self) -> bool:
        """End runs that are still open, which only a died flow leaves, and mark the journal as sent."""
        # A journal without its end belongs to a flow that was killed.
        if not self.closed and self.place.runs:
            try:
                reaching(self._kill_open)
            except Unreachable as error:
                self._note(error)
                return False
            except RefusedEvent as error:
                self.place.refused += 1
                logger.error("a run of a flow that died is not ended: %s", error)
        self.place.done = True
        self.place.save(self.folder)
        return True

    def _kill_open(self) -> None:
        for run in self.place.runs.values():
            if self._client().get_run(run).info.status == "RUNNING":
                self._client().set_terminated(run, "KILLED")


class Unreachable(Exception):
    """MLflow did not take an event that it may take later; worth another try."""


class RefusedEvent(Exception):
    """MLflow answered that it does not accept an event; `status` is the HTTP status, `code` MLflow's name for the reason."""

    def __init__(self, error: MlflowException) -> None:
        super().__init__(f"HTTP {error.get_http_status_code()}: {str(error)[:_CHARS]}")
        self.status, self.code = int(error.get_http_status_code()), str(error.error_code)


class _UnknownRun(Exception):
    """An event belongs to a run that MLflow was never asked to make."""


def reaching(call: Callable[[], _T]) -> _T:
    """Return the result of a call to MLflow. Raises RefusedEvent for a 4xx answer and Unreachable for none, or for a failing server.

    This is the boundary to a foreign service whose errors take many forms: each becomes one of the two.
    """
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        status = error.get_http_status_code()
        # 408 and 429 ask for another try.
        if 400 <= status < 500 and status not in (408, 429):
            raise RefusedEvent(error) from error
        raise Unreachable(f"MLflow failed: {str(error)[:_CHARS]}") from error
    except (requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise Unreachable(f"MLflow cannot be reached: {str(error)[:_CHARS]}") from error


def _address(uri: str) -> str:
    """Return where MLflow is: the environment's address, which may hold credentials, else the journal's, which never does."""
    return os.environ.get("MLFLOW_TRACKING_URI") or uri


def _windows(events: Sequence[tuple[int, Event]]) -> Iterable[list[tuple[int, Event]]]:
    """Put neighbours together that do not wait for each other; every other event stands alone."""
    window: list[tuple[int, Event]] = []
    for item in events:
        if window and not (item[1]["op"] in _ORDER and window[-1][1]["op"] in _ORDER and len(window) < _WINDOW):
            yield window
            window = []
        window.append(item)
    if window:
        yield window


def _groups(events: Sequence[Event]) -> list[list[Event]]:
    """Return the events of a window as they go out: metrics, tags and traces of a run together, every other event by itself."""
    groups: dict[tuple[int, object], list[Event]] = {}
    for number, event in enumerate(events):
        place = _ORDER.index(event["op"]) if event["op"] in _ORDER else 0
        groups.setdefault((place, event["key"] if event["op"] in _TOGETHER else number), []).append(event)
    return [groups[which] for which in sorted(groups, key=lambda which: which[0])]


def _experiment(client: MlflowClient, name: str, artifacts: str) -> str:
    """Return the id of an experiment: made when missing, restored when deleted. On a sqlite file its artifacts stand beside that file."""
    experiment = client.get_experiment_by_name(name) or _made_experiment(client, name, artifacts)
    _restored(client, experiment.experiment_id)
    dress(client, experiment)
    return str(experiment.experiment_id)


def _made_experiment(client: MlflowClient, name: str, artifacts: str) -> Experiment:
    from mlflow.exceptions import MlflowException

    # Otherwise the server decides where artifacts lie.
    local = str(client.tracking_uri).startswith("sqlite")
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=Path(artifacts).as_uri() if local else None))
    except MlflowException:  # another run made it in between
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment


def _restored(client: MlflowClient, experiment: str) -> bool:
    """Bring a deleted experiment back with its runs; return whether it was deleted."""
    if client.get_experiment(experiment).lifecycle_stage == "active":
        return False
    client.restore_experiment(experiment)
    logger.warning("experiment %s had been deleted; it is restored", experiment)
    return True


class _Redacted(logging.Formatter):
    """Formats records without the credentials of addresses in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))


def _log_to_stderr() -> None:
    guard_logs()
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the sender process."""
    parser = argparse.ArgumentParser("tasks.tracking.sender", description="Pass tracking journals on to MLflow.")
    parser.add_argument("folder", type=Path, help="folder of journals")
    parser.add_argument("--live", help="name of the journal that is still being written")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a silent MLflow after the flow's end")
    options = parser.parse_args(arguments)
    _log_to_stderr()
    # Tracking must not take the processor from training.
    os.nice(5)
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    return send_all(options.folder, options.live, options.patience)


if __name__ == "__main__":
    raise SystemExit(main())
