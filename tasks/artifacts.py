"""What a run shows in Prefect: tables, cards and images. Reads manifests and artifacts; computes nothing.

An unreachable Prefect server costs the picture, never the stage.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException

from research_rl.config import located, parameters
from research_rl.config.redact import redact_tree
from research_rl.evaluation.intervals import FEWEST
from research_rl.evaluation.judging import standing
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, measured
from research_rl.report import markdown
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.watch import Finding
from research_rl.validation.docs import SUMMARY, named, rank
from tasks.evaluation.to_mlflow import FIRST, Evaluation, track
from tasks.job import Job, StageOutcome
from tasks.tracking.track import FLOW, NOTE, StageRun, Tracker, changed

__all__ = [
    "build_report",
    "evaluation_table",
    "index_card",
    "quality_table",
    "refused_table",
    "report_page",
    "scored",
    "showing",
    "watch_note",
]

_WAIT_S = 30.0
# The report is built with the links that are known by then; the page in Prefect, published after it, may wait for the others.
_LINK_WAIT_S = 2.0
_CELL = 100
_ENDS = {"mean": "", "low": "_low", "high": "_high"}
_EVALUATED = {"baseline": ("before", "policy"), "evaluate": ("after", "export")}
"""Name of the policy, and the stage that made it, by the stage of its evaluation."""
_RUNS = {"this run": FLOW, "evaluation before training": "baseline", "evaluation after training": "evaluate", "training": "train"}


@contextmanager
def showing(what: str) -> Generator[None]:
    """Report a failure to show `what` instead of raising it."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("%s is not shown: %s", what, error)


def quality_table(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Publish the data-quality table; with MLflow the same report as a file."""
    checks, against = artifact.facts["checks"], artifact.facts["drift"]["against"]
    _quality(checks, f"Accepted, report {artifact.hash[:12]}, drift against {against[:19]}", job.workspace.work("data-docs"))
    # An artifact is told to MLflow once, however many runs find it current.
    if run.fresh:
        run.artifact(job.workspace.folder("validate") / "report.json")


def refused_table(checks: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """Publish the table of a snapshot that broke critical expectations, those first."""
    _quality(sorted(checks, key=rank), "REFUSED", docs)


def _quality(checks: Sequence[Mapping[str, Any]], what: str, docs: Path) -> None:
    rows = [
        {
            "result": "passed" if check["passed"] else check["severity"],
            "suite": check["suite"],
            "column": check["column"],
            "observed": check["observed"][:80],
            "first rows": "; ".join(map(named, check["rows"])),
            "limit": check["limit"][:80],
            "expectation": check["expectation"].removeprefix("expect_").replace("_", " "),
        }
        for check in checks
    ]
    failed = sum(not check["passed"] for check in checks)
    with showing("the data-quality table"):
        create_table_artifact(
            rows, key="data-quality", description=f"{what}: {len(rows)} checks, {failed} not passed; data docs: {docs / SUMMARY}"
        )


def index_card(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Publish a card that says what the index is made of, how well it finds and what it took; MLflow gets the same as metrics and file."""
    rows: list[tuple[str, str, str]] = []
    for name in ("corpus", "embed", "index"):
        part = artifact if name == "index" else manifest.load(job.workspace.folder(name), verify=False)
        rows += [(name, key, value) for key, value in _properties(part, measured(job.workspace, part))]
    took = measured(job.workspace, artifact)
    lines = ["# Index", "", markdown.table(("part", "property", "value"), rows), *_index_quality(artifact, took)]
    if run.fresh:
        run.metrics(_index_metrics(artifact, took))
        run.artifact(job.workspace.folder("index") / manifest.MANIFEST)
    sections = STAGES["embed"].sections + STAGES["index"].sections
    # Prefect's pages may be read by others than the owner of params.yaml.
    tree = redact_tree(parameters(located(job.config, job.workspace.root), sections))
    lines += ["", "Parameters:", "", "```json", *(f"{name}: {tree[name]}" for name in sections), "```"]
    with showing("the index card"):
        create_markdown_artifact("\n".join(lines), key="index-card", description=f"Index {artifact.hash[:12]}")


def _index_quality(artifact: Manifest, took: Mapping[str, Any]) -> list[str]:
    """Return tables of recall against exact search, of certified replies and of latency; nothing for an index that is exact."""
    lines: list[str] = []
    if recall := artifact.facts.get("recall"):
        lines += ["", markdown.table(("k", "recall against exact search"), [(str(k), f"{value:.4f}") for k, value in recall.items()])]
    for kind, shares in artifact.facts.get("certified", {}).items():
        title = f"replies certified ({kind})"
        lines += ["", markdown.table(("candidates at most", title), [(most, f"{share:.4f}") for most, share in shares.items()])]
    if latency := took.get("latency"):
        times = [(str(size), str(value["p50_ms"]), str(value["p99_ms"])) for size, value in latency.items()]
        lines += ["", markdown.table(("batch", "median, ms", "99th percentile, ms"), times)]
    return lines


def _index_metrics(artifact: Manifest, took: Mapping[str, Any]) -> dict[str, float]:
    """Return size, recall, latency and cost of an index by MLflow name."""
    latency: dict[str, dict[str, float]] = took.get("latency", {})
    return {
        "index/bytes": float(sum(entry.size for entry in artifact.files)),
        **{f"index/recall_at_{k}": value for k, value in artifact.facts.get("recall", {}).items()},
        **{f"index/batch_{size}_{name}": value for size, times in latency.items() for name, value in times.items()},
        **{f"index/{name}": float(value) for name, value in took.items() if isinstance(value, int | float)},
    }


def _properties(part: Manifest, took: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = [(name, f"{value:,}") for name, value in part.counts.items()]
    facts = [(name, _short(value)) for name, value in {**part.facts, **took}.items() if not isinstance(value, list)]
    size = sum(entry.size for entry in part.files)
    return [*counts, *facts, ("size", f"{size / 1e6:,.2f} MB in {len(part.files)} files"), ("hash", f"`{part.hash[:12]}`")]


def _short(value: Any) -> str:
    """Return a value in at most `_CELL` characters."""
    text = ", ".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= _CELL else text[:_CELL] + "…"


def watch_note(finding: Finding, good: Checkpoint | None) -> None:
    """Publish what a rule of the collapse watch saw and what helps."""
    rescue = f"step {good.step}, `{good.path}`; `train.steps={good.step}` publishes it" if good else "none from before the breach"
    lines = [f"# {'Training stopped' if finding.stops else 'Training in danger'} at step {finding.step}", "", finding.text + ".", ""]
    rows = [("in breach since", f"step {finding.since}"), ("last good checkpoint", rescue), ("what helps", finding.remedy)]
    lines += [markdown.table(("", ""), [*rows, ("to go on all the same", f"`watch.{finding.rule}.action=warn`")])]
    with showing("the finding of the watch"):
        create_markdown_artifact("\n".join(lines), key="collapse-watch", description=finding.text)


def evaluation_table(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Publish one evaluation's metrics with their intervals; MLflow gets the same names for every evaluation, and sampled episodes."""
    folder = job.workspace.folder(artifact.stage)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    intervals = _intervals(metrics)
    if run.fresh:
        model, policy = _EVALUATED[artifact.stage]
        judgements = [judged for judged, _ in standing(job.workspace.root, artifact.hash)]
        evaluation = Evaluation(folder, artifact, model, artifact.parents[policy], judgements=judgements)
        track(run, job.config, job.workspace.root, evaluation)
    rows = [{"metric": name, **{key: round(value[key], 4) for key in _ENDS}} for name, value in intervals.items()]
    with showing("the evaluation table"):
        create_table_artifact(rows, key=f"{artifact.stage}-evaluation", description=f"{metrics['n']} questions, 95 % intervals")


def report_page(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Publish the comparison before / after with links to MLflow, and the training curves as an image."""
    folder = job.workspace.folder("report")
    # On the run as a whole, also when the report was current: MLflow's list of runs shows these.
    job.tracker.metrics(_headline(artifact.facts) | _brought(artifact.facts, job.outcomes))
    job.tracker.tags(FLOW, {"verdict": _verdict(artifact.facts), NOTE: _note(job, artifact.facts)})
    if run.fresh:
        _track_report(job, artifact, run)
    head, links = ("metric", "before", "after", "difference", "95 % interval, paired"), _links(job, _WAIT_S if run.fresh else 0.0)
    text = "\n".join(["# Before and after training", "", markdown.table(head, _changes(artifact.facts)), "", "MLflow:", *links])
    with showing("the report"):
        create_markdown_artifact(text, key="evaluation-report", description="The same held-out questions before and after training")
        create_image_artifact(
            _image(folder / "training.png"), key="training-curves", description="Reward, format and searches per training step"
        )


def _changes(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row a metric from the facts of a report: before, after, difference, interval."""
    return [
        (
            name,
            f"{facts['before'][name]:.3f}",
            f"{facts['after'][name]:.3f}",
            f"{value['mean']:+.3f}",
            f"{value['low']:+.3f} to {value['high']:+.3f}",
        )
        for name, value in facts["difference"].items()
    ]


def _track_report(job: Job, artifact: Manifest, run: StageRun) -> None:
    folder = job.workspace.folder("report")
    for name in ("training.png", "report.html", "trajectories.html", "metrics.json"):
        run.artifact(folder / name)
    differences = artifact.facts["difference"]
    run.metrics({f"difference/{name}": value["mean"] for name, value in differences.items()})
    first = [name for name in FIRST if name in differences]
    run.metrics({f"interval/{name}{_ENDS[end]}": differences[name][end] for name in first for end in ("low", "high")})
    run.tags({"manifest": artifact.hash})
    _describe(job, artifact, run)


def _headline(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what a run is judged by, under names that stand side by side in MLflow's list of runs."""
    numbers: dict[str, float] = {"questions": facts["difference"]["f1"]["n"]}
    for name in ("f1", "em"):
        change = facts["difference"][name]
        numbers |= {f"{name}_before": facts["before"][name], f"{name}_after": facts["after"][name], f"{name}_difference": change["mean"]}
        numbers |= {f"{name}_difference_low": change["low"], f"{name}_difference_high": change["high"]}
    return numbers


def _brought(facts: Mapping[str, Any], outcomes: Mapping[str, StageOutcome]) -> dict[str, float]:
    """Return what was trained and what it took: steps, the reward of the last tenth of them, and this run's seconds, by stage too."""
    built = {name: outcome.seconds for name, outcome in outcomes.items() if outcome.built}
    trained = {"steps": float(facts["train"]["steps"]), "reward": facts["train"]["reward_last"]}
    return {**trained, "seconds": sum(built.values()), **{f"seconds/{name}": value for name, value in built.items()}}


def _note(job: Job, facts: Mapping[str, Any]) -> str:
    """Return what MLflow shows at the head of a run: what came out, whether it is noise, what was changed, what it took."""
    numbers = _headline(facts) | _brought(facts, job.outcomes)
    seconds = f"{numbers['seconds']:,.0f} s in the stages that this run built" if numbers["seconds"] else "nothing: every stage was current"
    rows = [
        ("result", f"{_verdict(facts)}: {scored(facts)}"),
        ("exact match", f"{numbers['em_before']:.3f} before, {numbers['em_after']:.3f} after"),
        ("trained", f"{numbers['steps']:.0f} steps, reward {facts['train']['reward_first']:.3f} to {numbers['reward']:.3f}"),
        ("changed in the profile", changed(job.config)),
        ("cost", seconds),
    ]
    return "\n".join(f"- **{name}**: {text}" for name, text in rows)


def scored(facts: Mapping[str, Any]) -> str:
    """Return in one sentence what a policy scored before and after training, from the facts of a report."""
    numbers = _headline(facts)
    return (
        f"F1 {numbers['f1_before']:.3f} before training, {numbers['f1_after']:.3f} after: {numbers['f1_difference']:+.3f}, 95 % interval "
        f"{numbers['f1_difference_low']:+.3f} to {numbers['f1_difference_high']:+.3f} over {numbers['questions']:.0f} questions"
    )


def _verdict(facts: Mapping[str, Any]) -> str:
    """Return in a few words what the interval of the F1 difference allows to say."""
    change = facts["difference"]["f1"]
    if change["n"] < FEWEST:
        return f"undecided: {change['n']} questions, it takes {FEWEST}"
    if change["low"] > 0:
        return "better"
    return "worse" if change["high"] < 0 else "undecided: the interval includes 0"


def _describe(job: Job, artifact: Manifest, run: StageRun) -> None:
    """Note on the registered version what it scored on the held-out questions."""
    if not (model := job.config.tracking.registered_model):
        return
    tags = {**{name: f"{value:.4g}" for name, value in _headline(artifact.facts).items()}, "verdict": _verdict(artifact.facts)}
    run.describe(model, manifest.load(job.workspace.folder("export"), verify=False).hash, scored(artifact.facts), tags)


def _links(job: Job, wait_s: float) -> list[str]:
    """Return the MLflow pages of this run and of the runs behind the compared artifacts."""
    lines = [f"- [{text}]({link})" for text, link in tracking_pages(job.tracker, job.workspace, wait_s)]
    evaluations = [manifest.load(job.workspace.folder(key), verify=False) for key in ("baseline", "evaluate")]
    if link := job.tracker.comparison(evaluations):
        lines.append(f"- [both evaluations side by side]({link})")
    return lines or ["- not reached yet"]


def tracking_pages(tracker: Tracker, workspace: Workspace, wait_s: float) -> list[tuple[str, str]]:
    """Return (text, address) of the MLflow pages of this run and its stages, as far as MLflow has answered within `wait_s`."""
    pages: list[tuple[str, str]] = []
    for text, key in _RUNS.items():
        artifact = None if key == FLOW else manifest.load(workspace.folder(key), verify=False)
        if link := tracker.link(key, artifact, wait_s):
            pages.append((text, link))
    return pages


def build_report(context: Context, run: StageRun) -> None:
    """Build the report with links to MLflow, as far as it has answered by now."""
    from research_rl.report.build import run as build

    build(context, tracking_pages(run.tracker, context.workspace, _LINK_WAIT_S))


def _intervals(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return every {mean, low, high} of an evaluation by name; stop reasons as stop/<reason>."""
    means: dict[str, dict[str, float]] = {name: value for name, value in metrics.items() if isinstance(value, dict) and "mean" in value}
    return {**means, **{f"stop/{name}": value for name, value in metrics.get("stop", {}).items()}}


def _image(path: Path) -> str:
    """Return a picture as a data address: a Prefect image artifact shows it without a server for files."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
