"""An evaluation among MLflow's own objects: dataset, prompt, logged model, and rows with their assessments. Knows MLflow and results.

Invariants: (1) no model is asked and nothing but MLflow is reached: the scores are those that were measured; (2) an event that comes
twice makes nothing twice; (3) an evaluation counts as sent only when each of its rows stands in MLflow with all its assessments.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research_rl.errors import DataError
from research_rl.evaluation.judging import read_verdicts
from research_rl.evaluation.results import Result, read_results
from research_rl.pipeline import manifest
from tasks.tracking.traces import Episode, Target, expected, is_verdict, log_judged, log_traces, remove, run_traces, standing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.evaluation_dataset import EvaluationDataset

__all__ = ["SCORES", "Sent", "judged", "send"]

SCORES = ("em", "f1", "reward", "searches")
"""What each row of an evaluation is assessed by; a judge's verdict comes to it where there is one."""
_BATCH = 100
"""As many traces as MLflow links in one request."""
_DONE = "research.evaluated"
_CONTENT = "research.sha256"
logger = logging.getLogger("sender")

Verdicts = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Sent(Target):
    """Where an evaluation goes, and the time and digest of the event that tells of it."""

    client: MlflowClient
    time: int
    event: str


def send(to: Sent, evaluation: Mapping[str, Any]) -> None:
    """Send an evaluation of one question set; see `StageRun.evaluation` for its form. One that MLflow has is passed over.

    Raises MlflowException, also when MLflow lost a part of it.
    """
    import mlflow

    # Datasets and prompts know no client, only the process's address and experiment.
    mlflow.set_tracking_uri(to.uri)
    mlflow.set_experiment(experiment_id=to.experiment)
    if to.client.get_run(to.run).data.tags.get(_DONE) == evaluation["manifest"]:
        return
    results = _results(Path(evaluation["folder"]), evaluation["manifest"], evaluation["set"])
    if not results:
        return
    dataset = _dataset(to, evaluation, results)
    model = _model(to, evaluation, _prompt(to, evaluation["prompt"]))
    _metrics(to, evaluation["metrics"], dataset, model)
    if shown := _spread(results, int(evaluation["traces"])):
        # Journals from before an evaluation could have several judgements name one, or none.
        folders = evaluation.get("judgements", [evaluation["judgement"]] if evaluation.get("judgement") else [])
        _rows(to, shown, [_verdicts(Path(folder)) for folder in folders])
    to.client.set_tag(to.run, _DONE, evaluation["manifest"])


def judged(to: Sent, event: Mapping[str, Any]) -> bool:
    """Put a judge's verdicts on the rows of an evaluation that MLflow has already; return whether it has any run of it.

    A row that has this judgement's verdict keeps it. Raises MlflowException.
    """
    import mlflow

    mlflow.set_tracking_uri(to.uri)
    runs = to.client.search_runs([to.experiment], f"tags.`{_DONE}` = '{event['evaluation']}'")
    verdicts = {(verdict["question"], verdict["prediction"]): verdict for verdict in _verdicts(Path(event["judgement"])).values()}
    for run in runs:
        for trace in run_traces(to.client, to.experiment, run.info.run_id):
            said = verdicts.get((_parsed(trace.data.request)["question"], _parsed(trace.data.response)))
            if said and not any(is_verdict(item, said) for item in trace.info.assessments):
                log_judged(said, run.info.run_id, trace_id=trace.info.trace_id)
    return bool(runs)


def _parsed(text: str | None) -> Any:
    return json.loads(text or "null")


def _results(folder: Path, hashed: str, name: str) -> list[Result]:
    """Return the results of a question set; none, with a line in the log, when the folder holds another evaluation by now."""
    artifact = manifest.found(folder, verify=False)
    if artifact is None or artifact.hash != hashed:
        logger.warning("%s no longer holds evaluation %s; its rows are not sent", folder, hashed[:12])
        return []
    try:
        return [result for result in read_results(folder) if result.data_source == name]
    except DataError as error:  # the journal may be older than this version
        logger.warning("the rows of evaluation %s are not sent: %s", hashed[:12], error)
        return []


def _spread(results: Sequence[Result], count: int) -> list[Result]:
    """Return up to `count` results, evenly spread."""
    count = min(count, len(results))
    return [results[round(place * (len(results) - 1) / max(1, count - 1))] for place in range(count)]


def _verdicts(folder: Path) -> dict[int, dict[str, Any]]:
    """Return a judge's verdicts by row, of the questions about which it gave one; none, with a line in the log, where they are gone."""
    artifact = manifest.found(folder, verify=False)
    if artifact is None:
        logger.warning("%s is gone; its verdicts are not sent", folder)
        return {}
    about = {"judgement": artifact.config_hash, **{name: str(artifact.parameters[name]) for name in ("preset", "model")}}
    return {item.row: {**asdict(item), **about} for item in read_verdicts(folder) if item.correct is not None}


def _dataset(to: Sent, evaluation: Mapping[str, Any], results: Sequence[Result]) -> EvaluationDataset:
    """Return the dataset of these questions, made and filled unless it stands; other questions of the same set make another."""
    records = [{"inputs": {"question": result.question}, "expectations": expected(result.golden_answers)} for result in results]
    content = _digest(records)
    name = f"{evaluation['set']}-{content[:8]}"
    datasets = to.client.search_datasets([to.experiment], f"name = '{name}'", max_results=1)
    if not datasets:
        tags = {"question_set": str(evaluation["set"]), _CONTENT: content}
        datasets = [to.client.create_dataset(name, to.experiment, tags)]
    dataset = datasets[0]
    # Records of equal questions become one, so that a try that was cut is made good by the next.
    if not dataset.profile:
        dataset.merge_records(records)
        dataset = to.client.get_dataset(dataset.dataset_id)
    return dataset


def _prompt(to: Sent, prompt: Mapping[str, str]) -> tuple[str, int]:
    """Return name and version of a prompt template, registered unless a version holds this text."""
    content = _digest(prompt["text"])
    try:
        versions = to.client.search_prompt_versions(prompt["name"])
    except Exception as error:
        if not _is_missing(error):
            raise
        versions = []
    for version in versions:
        if version.tags.get(_CONTENT) == content:
            return prompt["name"], int(version.version)
    # MLflow marks what is filled in by double braces, and takes any other brace as text.
    text = prompt["text"].replace("{question}", "{{question}}")
    made = to.client.register_prompt(prompt["name"], text, prompt.get("message"), {_CONTENT: content})
    return prompt["name"], int(made.version)


def _is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _model(to: Sent, evaluation: Mapping[str, Any], prompt: tuple[str, int]) -> LoggedModel:
    """Return the logged model of policy, index, prompt and method, made unless it stands; it links the prompt."""
    from mlflow.entities import LoggedModelStatus

    model = evaluation["model"]
    content = _digest([model["params"], prompt])
    models = to.client.search_logged_models([to.experiment], f"tags.`{_CONTENT}` = '{content}'", max_results=1)
    params = {**model["params"], "prompt": f"prompts:/{prompt[0]}/{prompt[1]}"}
    tags = {**model["tags"], _CONTENT: content}
    made = models[0] if models else to.client.create_logged_model(to.experiment, model["name"], to.run, tags, params, "agent")
    if made.status == LoggedModelStatus.READY:
        return made
    to.client.link_prompt_version_to_model(prompt[0], str(prompt[1]), made.model_id)
    # Its weights lie in our own artifact and in the registry; nothing more is uploaded.
    return to.client.finalize_logged_model(made.model_id, "READY")


def _metrics(to: Sent, values: Mapping[str, float], dataset: EvaluationDataset, model: LoggedModel) -> None:
    """Log the numbers of the evaluation on its run, and with it on dataset and model."""
    from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric

    where = {"model_id": model.model_id, "dataset_name": dataset.name, "dataset_digest": dataset.digest, "run_id": to.run}
    entity = Dataset(dataset.name, dataset.digest, "mlflow", dataset.source.to_json(), dataset.schema, dataset.profile)
    to.client.log_inputs(to.run, [DatasetInput(entity)], [LoggedModelInput(model.model_id)])
    to.client.log_batch(to.run, [Metric(name, float(value), to.time, 0, **where) for name, value in values.items()])


def _rows(to: Sent, results: Sequence[Result], verdicts: Sequence[Verdicts]) -> None:
    """Fill the evaluation view: a trace a question, with what was measured of it, in a run of the kind that the view lists.

    That is what `mlflow.genai.evaluate` leaves. It would score each row again, by four requests more, would end the run by its own
    clock, and would only log what it lost.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_TYPE, MLFLOW_RUN_TYPE_GENAI_EVALUATE

    _forget(to)
    rows = log_traces([Episode(to, _record(result, verdicts), to.time, to.event) for result in results])
    _require_all(to, len(rows))
    for first in range(0, len(rows), _BATCH):
        to.client.link_traces_to_run(rows[first : first + _BATCH], to.run)
    to.client.set_tag(to.run, MLFLOW_RUN_TYPE, MLFLOW_RUN_TYPE_GENAI_EVALUATE)


def _record(result: Result, verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """Return a result as the record `traces` understands."""
    scores = {name: float(getattr(result, name)) for name in SCORES}
    about = {"question": result.question, "golden_answers": list(result.golden_answers), "prediction": result.prediction}
    return {**result.trajectory, **about, "scores": scores, "verdicts": [by_row[result.row] for by_row in verdicts if result.row in by_row]}


def _forget(to: Sent) -> None:
    """Remove what an earlier try of this event left half done."""
    remove(to.client, to.experiment, [trace.info.trace_id for trace in standing(to.client, to.experiment, to.event)])


def _require_all(to: Sent, count: int) -> None:
    """Raise MlflowException, which is tried again, when a trace or a score is missing."""
    from mlflow.exceptions import MlflowException

    whole = sum({*SCORES} <= {item.name for item in trace.info.assessments} for trace in standing(to.client, to.experiment, to.event))
    if whole != count:
        raise MlflowException(f"{count - whole} of {count} rows of an evaluation did not arrive whole; they are sent again")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
