"""How an experiment looks in MLflow's pages: where it opens, what it says, which columns and charts its view shows. Knows tags only.

Invariant: what a person wrote or chose stays: a tag that is there is never written again.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

__all__ = ["COLUMNS", "VIEW", "dress"]

VIEW = "research-results"
"""The id of the view that shows what a run is judged by; MLflow lists it under its name, and addresses name it by this."""
_VIEW_NAME = "Before and after training"
COLUMNS = (
    "tags.`verdict`",
    "metrics.`f1_before`",
    "metrics.`f1_after`",
    "metrics.`f1_difference`",
    "metrics.`f1_difference_low`",
    "metrics.`f1_difference_high`",
    "metrics.`em_difference`",
    "metrics.`steps`",
    "metrics.`reward`",
    "metrics.`seconds`",
    "tags.`changed`",
)
_CHARTS = ("f1_difference", "f1_after", "f1_before", "em_difference", "em_after", "em_before", "reward", "seconds")
_PRIMARY = "mlflow.experiment.primaryMetric"
_SECTION = "results"


def dress(client: MlflowClient, experiment: Experiment) -> None:
    """Give an experiment its kind, its description, its primary metric and its view, where it has none."""
    identifier = str(experiment.experiment_id)
    tags = {
        # MLflow's pages then open it on its runs, and not on the use of language models.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": _description(identifier),
        f"{_PRIMARY}.name": "f1_difference",
        f"{_PRIMARY}.greaterIsBetter": "True",
        f"mlflow.sharedViewState.{VIEW}": _view(int(experiment.creation_time or 0)),
    }
    for name, value in tags.items():
        if name not in experiment.tags:
            client.set_experiment_tag(identifier, name, value)


def _description(experiment: str) -> str:
    page = f"#/experiments/{experiment}"
    return "\n".join(
        [
            "Policies that reason with search, trained by GRPO and evaluated on held-out questions.",
            "",
            f"- [Did training help?]({page}/runs?viewStateShareKey={VIEW}): a line a run, with F1 before and after, the difference with "
            "its 95 % interval, the verdict, and what was changed in the profile.",
            f"- [Evaluations, question by question]({page}/evaluation-runs): answers with their scores; mark two to compare them.",
            f"- [Episodes]({page}/traces): thoughts, searches and passages. [Question sets]({page}/datasets). [Prompts]({page}/prompts).",
            f"- [Policies with index and prompt]({page}/models): every number that was measured of each.",
        ]
    )


def _view(created_ms: int) -> str:
    """Return the view in the form in which MLflow's pages keep one that a user saved."""
    charts = [_chart(name) for name in _CHARTS]
    section = {"uuid": _SECTION, "name": _VIEW_NAME, "display": True, "isReordered": False}
    state = {
        # Runs of a whole, not those of their stages.
        "searchFilter": "tags.flow != ''",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "compareRunCharts": charts,
        "compareRunSections": [section],
    }
    return json.dumps({"name": _VIEW_NAME, "createdAt": created_ms, "updatedAt": created_ms, "state": json.dumps(state)})


def _chart(metric: str) -> dict[str, Any]:
    return {
        "type": "BAR",
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, metric)),
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "runsCountToCompare": 10,
    }
