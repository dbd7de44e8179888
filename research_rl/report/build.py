"""Stage report: curves, paired differences and pages over one run. Knows the three parents; evaluates nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.episode.trajectory import StopReason
from research_rl.evaluation.comparison import Comparison, Pair, PairedMetric, by_group, compare_results, outcome
from research_rl.evaluation.results import read_results
from research_rl.pipeline.stages import Context
from research_rl.report import figure, html, provenance
from research_rl.report.files import CURVES, HEADLINE
from research_rl.report.format import difference_rows, left_out, metric_head, verdict
from research_rl.report.html import ColouredCell
from research_rl.report.parameters import public
from research_rl.report.training import Curves, read_curves
from research_rl.report.viewer import evaluated, rolled_out, spread, validated, viewer
from research_rl.training.run.rollouts import read_rollouts, rollout_files

__all__ = ["run"]

Links = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Findings:
    """What the page and metrics.json say: the comparison over all questions and by number of supporting passages."""

    compared: Comparison
    hops: dict[str, list[PairedMetric]]
    curves: Curves


def run(context: Context, links: Links = ()) -> None:
    """Publish metrics.json, headline.json, curves.csv, training.png, report.html and trajectories.html.

    `links` are (text, address) of tracking pages.
    """
    train, findings = context.parent("train"), _findings(context)
    with context.publish() as staging:
        title = f"GRPO, profile {context.config.profile}"
        # Two pictures: a page that follows the reader's colour scheme cannot recolour a PNG.
        figure.draw(findings.curves, staging.path / "training.png", title)
        dark = figure.render(findings.curves, title, dark=True)
        _write(staging.path / "metrics.json", json.dumps(_numbers(findings), indent=1, sort_keys=True) + "\n")
        _write(staging.path / HEADLINE, json.dumps(_headline(findings.compared.metrics, findings.curves), indent=1) + "\n")
        _write(staging.path / CURVES, findings.curves.to_csv())
        _write(staging.path / "report.html", _page(context, findings, (staging.path / "training.png").read_bytes(), dark, links))
        groups = evaluated(findings.compared.matched.everything) + validated(_sampled(train, "dev")) + rolled_out(_sampled(train, ""))
        _write(staging.path / "trajectories.html", viewer(groups, "Trajectories"))
        pairs = findings.compared.matched.everything
        staging.counts |= {"questions": len(pairs), "steps": findings.curves.steps, **_outcomes(pairs)}
        # The manifest alone answers what a run brought, without reading the pages.
        staging.facts |= _numbers(findings)


def _findings(context: Context) -> _Findings:
    settings = context.config.evaluation
    before, after = read_results(context.parent("baseline")), read_results(context.parent("evaluate"))
    compared = compare_results(before, after, settings.bootstrap, settings.seed)
    hops = by_group(compared.matched.pairs, lambda result: str(result.hops), settings.bootstrap, settings.seed)
    return _Findings(compared, hops, read_curves(context.parent("train")))


def _sampled(train: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rollouts of steps spread over the run."""
    files = rollout_files(train, split)
    return read_rollouts({step: files[step] for step in spread(list(files))})


def _outcomes(pairs: Sequence[Pair]) -> dict[str, int]:
    outcomes = [outcome(pair) for pair in pairs]
    names = {"wins": "win", "losses": "loss", "ties": "tie", "lost": "lost"}
    return {name: outcomes.count(kind) for name, kind in names.items()}


def _numbers(findings: _Findings) -> dict[str, Any]:
    metrics, curves = findings.compared.metrics, findings.curves
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


def _page(context: Context, findings: _Findings, png: bytes, dark_png: bytes, links: Links) -> str:
    matched, metrics, stages = findings.compared.matched, findings.compared.metrics, provenance.stage_facts(context)
    first, last = findings.curves.ends("reward")
    return html.render(
        "report.html.j2",
        "Before and after training",
        profile=context.config.profile,
        questions=len(matched.everything),
        steps=findings.curves.steps,
        facts=provenance.headline(context, stages),
        verdict=verdict(metrics, "f1"),
        left_out=left_out(matched),
        # Pages are shared: no credentials in an address, and no scheme that a browser would run.
        links=[(text, public(address)) for text, address in links if address.startswith(("http://", "https://"))],
        metric_head=metric_head("before", "after"),
        metrics=difference_rows(metrics),
        hop_head=("passages", *metric_head("before", "after")[1:]),
        hops=_hop_rows(findings.hops),
        stops=_stop_rows(matched.everything),
        reward_first=first,
        reward_last=last,
        figure=html.png_address(png),
        dark_figure=html.png_address(dark_png),
        changed=provenance.changed(context),
        stages=provenance.stage_rows(stages),
    )


def _hop_rows(hops: dict[str, list[PairedMetric]]) -> list[list[str | ColouredCell]]:
    rows: list[list[str | ColouredCell]] = []
    for group, metrics in hops.items():
        chosen = [metric for metric in metrics if metric.name in {"f1", "searches", "recall"}]
        rows += [[f"{group}: {row[0]}", *row[1:]] for row in difference_rows(chosen)]
    return rows


def _stop_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    def share(side: int, reason: StopReason) -> str:
        return f"{sum(pair[side].stop == reason for pair in pairs) / max(1, len(pairs)):.1%}"

    rows = [[reason.value.replace("_", " "), share(0, reason), share(1, reason)] for reason in StopReason]
    # A reason that no episode ended with only lengthens the table.
    return [row for row in rows if row[1:] != ["0.0%", "0.0%"]]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
