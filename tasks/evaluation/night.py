"""Task night: the policy in service against the last night that was accepted; a fall is an event of Prefect."""

from __future__ import annotations

from dataclasses import asdict

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from research_rl.errors import ServiceError
from research_rl.evaluation import cells
from research_rl.evaluation import night as nights
from research_rl.evaluation.cells import Model
from research_rl.evaluation.intervals import FEWEST
from research_rl.evaluation.night import Night
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.process.registry import Registry
from research_rl.report import markdown
from research_rl.report.format import p_value
from tasks import limits
from tasks.artifacts import showing
from tasks.evaluation.gate import NO_CHAMPION, WAIT_S, champion
from tasks.job import Job, folder_of, resolve
from tasks.stage import Progress, retried

__all__ = ["NOTHING_TO_MEASURE", "absent", "night"]

NOTHING_TRAINED = "no policy was trained here"
NOTHING_TO_MEASURE = f"{NOTHING_TRAINED} and there is no champion, so there is nothing to measure; research-train makes one"

_HEAD = ("questions", "accepted night", "this night", "difference", "95 % interval, paired", "p (Holm)", "n", "")


@retried("night", "the policy in service against the last accepted night")
def night(job: Job, accept: bool) -> State[list[str]]:
    """Measure the champion, show how it moved, and raise an event where it fell; return the question sets that did."""
    model = _in_service(job)
    if model is None:
        get_run_logger().warning(NO_CHAMPION)
        return Completed(name="NotDecided", message=NO_CHAMPION, data=[])
    progress = Progress(nights.STAGE, get_run_logger().info, job.proceed)
    with job.tracker.stage(nights.STAGE, job.config, ("evaluation",)) as run:
        with limits.place():
            result = nights.measure(job.config, job.workspace, model, progress)
        progress.finish()
        run.finished(result.manifest, result.fresh)
        # Told once: the same night found again tomorrow is no news.
        if run.fresh:
            run.artifact(result.folder / "metrics.json")
            if result.regressed:
                _raise_event(job, result, model)
    if accept:
        nights.accept(job.workspace, result)
    _show(result, model)
    return Completed(name=None if result.fresh else "Cached", message=f"{result.folder.name}: {result.verdict}", data=result.regressed)


def absent(workspace: str) -> str:
    """Return why there is nothing to measure in a workspace, empty where there is. Asks the registry only where nothing was trained.

    A schedule runs on every machine that was set up: there it ends before a run of MLflow is made.
    """
    root = folder_of(workspace)
    if manifest.found(Workspace(root).folder("export"), verify=False):
        return ""
    try:
        model = resolve(root, None, {}).tracking.registered_model
        profile = None if (root / "params.yaml").is_file() else "laptop"
        reason = "" if Registry(root, profile).champion(model) else NOTHING_TO_MEASURE
    except ServiceError as error:
        reason = f"{NOTHING_TRAINED}, and MLflow does not say whether there is a champion: {error}"
    if reason:
        get_run_logger().info(reason)
    return reason


def _in_service(job: Job) -> Model | None:
    """Return the champion, the trained policy where there is none, and None when the registry has not answered."""
    registered = job.config.tracking.registered_model
    stands = job.tracker.standing(WAIT_S) if registered else {}
    if stands is None:
        return None
    return champion(job, str(registered), stands) if stands else cells.model("after", job.config, job.workspace)


def _show(result: Night, model: Model) -> None:
    rows = [
        (
            drift.question_set,
            f"{drift.before:.3f}",
            f"{drift.after:.3f}",
            f"{drift.mean:+.3f}",
            f"{drift.low:+.3f} to {drift.high:+.3f}",
            p_value(drift.p),
            str(drift.n),
            "fell" if drift.regressed else "",
        )
        for drift in result.drifts
    ]
    place = f"Kept in `{result.folder}`."
    text = "\n".join([f"# Night of {model.name}", "", *_against(result), "", markdown.table(_HEAD, rows), "", place])
    with showing("the night"):
        create_markdown_artifact(text, key="night", description=f"{result.folder.name}, {result.verdict}")
    get_run_logger().info("night of %s: %s", model.name, result.verdict)


def _against(result: Night) -> list[str]:
    """Return what the night is compared with, how to see more of that, and on which sets it could not be compared."""
    if not result.against:
        return ["This night is what later ones are compared with."]
    command = (
        f"Compared with the accepted night {result.against}; `research compare {result.against} {result.folder.name}` shows what changed."
    )
    if not result.unknown:
        return [command]
    few = (
        f"Not comparable on {', '.join(result.unknown)}: fewer than {FEWEST} questions were answered in both nights. Later nights are "
        "still compared with the accepted one; run this with `accept=true` to let them be compared with this one."
    )
    return [command, "", few]


def _raise_event(job: Job, result: Night, model: Model) -> None:
    emit_event(
        "research.night.regressed",
        resource={"prefect.resource.id": f"research.model.{job.config.tracking.registered_model or model.name}"},
        payload={"night": result.folder.name, "against": result.against, "drifts": [asdict(drift) for drift in result.drifts]},
    )
