"""Pass journals on to MLflow; runs as its own process beside a flow. Knows events and MLflow; knows no stage.

Invariants: (1) an event is marked sent only after MLflow took it; (2) an event that MLflow refuses is logged and
skipped, one that it cannot be asked about is tried again; (3) a run whose flow died is ended as KILLED.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.settings import sign_in
from tasks.tracking.journal import Place, read

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["main", "metric_name", "send_all"]

FLOW = "flow"
_JOURNAL = "research.journal"
_POLL_S = 0.3
_LONGEST_WAIT_S = 10.0
_BATCH = 1000
logger = logging.getLogger("sender")

Event = Mapping[str, Any]


def metric_name(name: str) -> str:
    """Return `name` with what MLflow does not allow in names replaced by underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def send_all(folder: Path, live: str | None, patience_s: float = 0.0) -> int:
    """Send every unfinished journal below `folder`, oldest first, then follow `live` until it is closed.

    A silent MLflow is waited for while `live` is open and for at least `patience_s` in all. Return 1 if some is left.
    """
    left = 0
    for path in sorted(item for item in folder.iterdir() if item.is_dir() and item.name != live):
        if not Place.load(path).done:
            left += not _Sender(path, 0.0, live=False).run()
    if live:
        left += not _Sender(folder / live, patience_s, live=True).run()
    return int(left > 0)


class _Sender:
    """Sends one journal."""

    def __init__(self, folder: Path, patience_s: float, *, live: bool) -> None:
        self.folder, self.patience_s, self.live = folder, patience_s, live
        self.place = Place.load(folder)
        self.client: MlflowClient | None = None
        self.closed = False
        self.retrying = True
        """Whether the next events may have been sent before, by a try whose reply was lost or a sender that was killed."""

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
            try:
                self._send(events)
                failing_since, wait, self.retrying = None, 1.0, False
            except _Unreachable as error:
                self.retrying = True
                failing_since = failing_since or time.monotonic()
                logger.warning("MLflow cannot be reached: %s", error)
                if (self.closed or not self.live) and time.monotonic() - failing_since >= self.patience_s:
                    return False
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def _send(self, events: Sequence[tuple[int, Event]]) -> None:
        for group in _groups(events):
            _reaching(lambda group=group: self._deliver([event for _, event in group]))
            self.place.offset = group[-1][0]
            self.place.save(self.folder)

    def _deliver(self, events: Sequence[Event]) -> None:
        operation = events[0]["op"]
        if operation == "metrics":
            self._metrics(events)
        else:
            getattr(self, f"_on_{operation}")(events[0])

    def _on_open(self, event: Event) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or str(event["uri"])
        sign_in(uri)
        self.client = MlflowClient(tracking_uri=uri)
        self.place.uri = uri
        self.place.experiment = _experiment(self.client, str(event["experiment"]), str(event["artifacts"]))
        self._begin(FLOW, event, str(event["name"]), event["time"], event["tags"], None)

    def _on_begin(self, event: Event) -> None:
        self._begin(event["key"], event, str(event["name"]), event["start"], {}, event["parent"])

    def _begin(self, key: str, event: Event, name: str, start: int, tags: Mapping[str, str], parent: str | None) -> None:
        from mlflow.entities import Param

        named = {**tags, "mlflow.runName": name, "mlflow.source.name": "research-rl", _JOURNAL: f"{self.folder.name}/{key}"}
        if parent:
            named["mlflow.parentRunId"] = self.place.runs[parent]
        if key not in self.place.runs:
            self.place.runs[key] = self._made(named[_JOURNAL]) or self._create(start, named)
        params = [Param(name, value) for name, value in event["params"].items()]
        for first in range(0, len(params), 100):
            self._client().log_batch(self.place.runs[key], params=params[first : first + 100])

    def _create(self, start: int, tags: Mapping[str, str]) -> str:
        return self._client().create_run(self.place.experiment, start_time=start, tags=dict(tags)).info.run_id

    def _made(self, journal: str) -> str | None:
        """Return the run that an earlier try made and whose reply was lost; only a retried event looks for one."""
        if not self.retrying:
            return None
        found = self._client().search_runs([self.place.experiment], f"tags.`{_JOURNAL}` = '{journal}'", max_results=1)
        return found[0].info.run_id if found else None

    def _metrics(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(metric_name(name), float(value), int(event["time"]), int(event["step"]))
            for event in events
            for name, value in event["values"].items()
            if isinstance(value, int | float)
        ]
        for first in range(0, len(metrics), _BATCH):
            self._client().log_batch(self._run(events[0]), metrics=metrics[first : first + _BATCH])

    def _on_tags(self, event: Event) -> None:
        from mlflow.entities import RunTag

        self._client().log_batch(self._run(event), tags=[RunTag(name, str(value)) for name, value in event["values"].items()])

    def _on_artifact(self, event: Event) -> None:
        path = Path(event["path"])
        if path.is_dir():
            self._client().log_artifacts(self._run(event), str(path), event["folder"] or None)
        elif path.is_file():
            self._client().log_artifact(self._run(event), str(path), event["folder"] or None)
        else:
            logger.warning("%s is gone; it is not uploaded", path)

    def _on_trace(self, event: Event) -> None:
        from tasks.tracking.traces import log_trace

        self._client()
        log_trace(self.place.uri, self.place.experiment, self._run(event), event["record"], int(event["time"]))

    def _on_register(self, event: Event) -> None:
        from tasks.tracking import registry

        registry.register(self._client(), self._run(event), event["model"], Path(event["path"]), event["tags"])

    def _on_alias(self, event: Event) -> None:
        from tasks.tracking import registry

        registry.point(self._client(), event["model"], event["manifest"], event["alias"])

    def _on_end(self, event: Event) -> None:
        self._client().set_terminated(self._run(event), event["status"], int(event["time"]))

    def _on_close(self, event: Event) -> None:
        self._client().set_terminated(self.place.runs[FLOW], event["status"], int(event["time"]))

    def _run(self, event: Event) -> str:
        return self.place.runs[event["key"]]

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        if self.client is None:
            sign_in(self.place.uri)
            self.client = MlflowClient(tracking_uri=self.place.uri)
        return self.client

    def _finish(self) -> bool:
        """End runs that are still open, which only a died flow leaves, and mark the journal as sent."""
        if not self.closed and self.place.runs:
            try:
                _reaching(self._kill_open)
            except _Unreachable as error:
                logger.warning("MLflow cannot be reached: %s", error)
                return False
        if self.place.runs:
            import mlflow

            mlflow.flush_trace_async_logging()
        self.place.done = True
        self.place.save(self.folder)
        return True

    def _kill_open(self) -> None:
        for run in self.place.runs.values():
            if self._client().get_run(run).info.status == "RUNNING":
                self._client().set_terminated(run, "KILLED")


class _Unreachable(Exception):
    """MLflow did not answer; worth another try."""


def _reaching(deliver: Callable[[], None]) -> None:
    """Run one delivery. A refusal is logged and dropped; raises _Unreachable when MLflow did not answer.

    This is the boundary to a foreign service whose errors take many forms: each becomes one of the two.
    """
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        deliver()
    except MlflowException as error:
        status = error.get_http_status_code()
        if 400 <= status < 500 and status not in (408, 429):
            logger.error("MLflow refused an event: %s", error)
        else:
            raise _Unreachable(str(error)[:300]) from error
    except (requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise _Unreachable(str(error)[:300]) from error
    except KeyError as error:
        logger.error("event of an unknown run %s is skipped", error)


def _groups(events: Sequence[tuple[int, Event]]) -> Iterable[list[tuple[int, Event]]]:
    """Put neighbouring metric events of one run together; every other event stands alone."""
    group: list[tuple[int, Event]] = []
    for item in events:
        event = item[1]
        fits = group and event["op"] == group[-1][1]["op"] == "metrics" and event["key"] == group[-1][1]["key"] and len(group) < 100
        if group and not fits:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _experiment(client: MlflowClient, name: str, artifacts: str) -> str:
    """Return the id of an experiment, made when missing. On a sqlite file its artifacts stand beside that file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    local = str(client.tracking_uri).startswith("sqlite")
    try:
        return client.create_experiment(name, artifact_location=Path(artifacts).as_uri() if local else None)
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the sender process."""
    parser = argparse.ArgumentParser("tasks.tracking.sender", description="Pass tracking journals on to MLflow.")
    parser.add_argument("folder", type=Path, help="folder of journals")
    parser.add_argument("--live", help="name of the journal that is still being written")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a silent MLflow after the flow's end")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.nice(5)
    quiet = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    return send_all(options.folder, options.live, options.patience)


if __name__ == "__main__":
    raise SystemExit(main())
