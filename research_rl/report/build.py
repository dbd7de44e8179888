"""Stage report: curves, paired differences and pages over one run. Knows the three parents; evaluates nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from research_rl.episode.trajectory import StopReason
from research_rl.evaluation.results import read_results
from research_rl.pipeline.stages import Context
from research_rl.report import figure, html
from research_rl.report.files import CURVES, HEADLINE
from research_rl.report.format import difference_rows, metric_head, verdict
from research_rl.report.pairs import Pair, PairedMetric, by_group, compare_metrics, match, outcome
from research_rl.report.training import Curves, read_curves
from research_rl.report.viewer import evaluated, rolled_out, spread, validated, viewer
from research_rl.training.run.rollouts import read_rollouts, rollout_files

__all__ = ["run"]


def run(context: Context) -> None:
    """Publish metrics.json, headline.json, curves.csv, training.png, report.html and trajectories.html."""
    settings = context.config.evaluation
    train = context.parent("train")
    curves = read_curves(train)
    pairs = match(read_results(context.parent("baseline")), read_results(context.parent("evaluate")))
    metrics = compare_metrics(pairs, settings.bootstrap, settings.seed)
    hops = by_group(pairs, lambda result: str(result.hops), settings.bootstrap, settings.seed)
    with context.publish() as staging:
        figure.draw(curves, staging.path / "training.png", f"GRPO, profile {context.config.profile}")
        _write(staging.path / "metrics.json", json.dumps(_numbers(metrics, curves), indent=1, sort_keys=True) + "\n")
        _write(staging.path / HEADLINE, json.dumps(_headline(metrics, curves), indent=1) + "\n")
        _write(staging.path / CURVES, curves.to_csv())
        _write(staging.path / "report.html", _page(context.config.profile, staging.path / "training.png", pairs, metrics, hops, curves))
        groups = evaluated(pairs) + validated(_sampled(train, "dev")) + rolled_out(_sampled(train, ""))
        _write(staging.path / "trajectories.html", viewer(groups, "Trajectories"))
        staging.counts |= {"questions": len(pairs), "steps": curves.steps, **_outcomes(pairs)}
        staging.facts |= _numbers(metrics, curves)


def _sampled(train: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rollouts of steps spread over the run."""
    files = rollout_files(train, split)
    return read_rollouts({step: files[step] for step in spread(list(files))})


def _outcomes(pairs: Sequence[Pair]) -> dict[str, int]:
    found = [outcome(pair) for pair in pairs]
    return {"wins": found.count("win"), "losses": found.count("loss"), "ties": found.count("tie")}


def _numbers(metrics: Sequence[PairedMetric], curves: Curves) -> dict[str, Any]:
    first, last = curves.ends("reward")
    return {
        "before": {metric.name: round(metric.before, 6) for metric in metrics},
        "after": {metric.name: round(metric.after, 6) for metric in metrics},
        "difference": {metric.name: metric.difference.to_json() for metric in metrics},
        "train": {"steps": curves.steps, "reward_first": round(first, 6), "reward_last": round(last, 6)},
    }


def _headline(metrics: Sequence[PairedMetric], curves: Curves) -> dict[str, Any]:
    """Return the few numbers by which runs are compared, without the groups and counts of metrics.json."""
    numbers: dict[str, Any] = {"steps": curves.steps}
    for metric in metrics:
        if metric.name in ("f1", "em"):
            change = metric.difference
            ends = {"difference": change.mean, "low": change.low, "high": change.high, "questions": change.n}
            numbers[metric.name] = {"before": round(metric.before, 6), "after": round(metric.after, 6), **ends}
    return numbers


def _page(
    profile: str, png: Path, pairs: Sequence[Pair], metrics: Sequence[PairedMetric], hops: dict[str, list[PairedMetric]], curves: Curves
) -> str:
    first, last = curves.ends("reward")
    body = (
        html.heading("Before and after training", 1)
        + html.paragraph(f"Profile {profile}: {len(pairs)} held-out questions, {curves.steps} steps of GRPO.", "lead")
        + html.paragraph(verdict(metrics, "f1"), "verdict")
        + html.paragraph(html.Html('<a href="trajectories.html">Look at the trajectories</a>'))
        + html.heading("Held-out questions")
        + html.paragraph("Difference: after minus before, question by question, with its 95 % interval (paired bootstrap).")
        + html.table(metric_head("before", "after"), difference_rows(metrics))
        + html.heading("By number of supporting passages")
        + html.table(("passages", *metric_head("before", "after")[1:]), _hop_rows(hops))
        + html.heading("Why episodes ended")
        + html.table(("stop reason", "before", "after"), _stop_rows(pairs))
        + html.heading("Training")
        + html.paragraph(f"Mean reward {first:.3f} over the first tenth of the steps, {last:.3f} over the last tenth.")
        + html.figure(png.read_bytes(), "reward, F1, format, searches and response length over the training step")
    )
    return html.page("Before and after training", body)


def _hop_rows(hops: dict[str, list[PairedMetric]]) -> list[list[str | html.Html]]:
    rows: list[list[str | html.Html]] = []
    for group, metrics in hops.items():
        chosen = [metric for metric in metrics if metric.name in {"f1", "searches", "recall"}]
        rows += [[f"{group}: {row[0]}", *row[1:]] for row in difference_rows(chosen)]
    return rows


def _stop_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    def share(side: int, reason: StopReason) -> str:
        return f"{sum(pair[side].stop == reason for pair in pairs) / max(1, len(pairs)):.1%}"

    rows = [[reason.value.replace("_", " "), share(0, reason), share(1, reason)] for reason in StopReason]
    return [row for row in rows if row[1:] != ["0.0%", "0.0%"]]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
