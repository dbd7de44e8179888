"""Tables of judgements: rates, agreement with exact match, failures, stability when swapped, disagreements. Reads artifacts; asks nobody.

Questions, predictions and rationales are text that nobody vouches for; they are shown shortened, in table cells that are safe to print.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from research_rl.evaluation.judge_metrics import stability
from research_rl.evaluation.judging import Judged, Judgement, read_verdicts
from research_rl.report import markdown
from research_rl.report.compare import RESAMPLES, SEED

__all__ = ["describe"]

_EXAMPLES, _REASONS, _SHOWN = 5, 3, 300
_HEAD = ("judgement", "set", "n", "failed", "lost", "judged right", "as published", "EM")
_AGREEMENT_HEAD = ("judgement", "both right", "judge right, EM wrong", "judge wrong, EM right", "both wrong", "agree", "kappa")
_CALIBRATION_HEAD = ("judgement", "stated", "not stated", "expected calibration error", "calibration error (RMS)", "Brier score")
_SWAP_HEAD = ("judgement", "n", "verdicts that stay", "to right", "to wrong")
_TABLE = ("judge_right_em_right", "judge_right_em_wrong", "judge_wrong_em_right", "judge_wrong_em_wrong")
_EXAMPLE_HEAD = ("judgement", "question", "accepted answers", "prediction", "EM", "judge", "rationale")


def describe(judgements: Sequence[Judgement]) -> str:
    """Return the judgements as Markdown that is safe to print; a swapped one beside its plain one shows what the order decides."""
    verdicts = {item: read_verdicts(item.folder) for item in judgements}
    metrics: dict[Judgement, dict[str, Any]] = {item: json.loads((item.folder / "metrics.json").read_text()) for item in judgements}
    parts = [markdown.table(_HEAD, [row for item in judgements for row in _rates(item, metrics[item], verdicts[item])])]
    parts += ["", "`judged right` counts failures as wrong; `as published` leaves them out."]
    parts += ["", markdown.table(_AGREEMENT_HEAD, [_agreement(item, metrics[item]) for item in judgements])]
    if calibrated := [_calibration(item, metrics[item]) for item in judgements if item.protocol.preset.reads_confidence]:
        parts += ["", markdown.table(_CALIBRATION_HEAD, calibrated), "", "Calibration is that of stated confidences."]
    if swaps := [*_swaps(verdicts)]:
        parts += ["", markdown.table(_SWAP_HEAD, swaps)]
    if failures := [row for item in judgements for row in _failures(item, verdicts[item])]:
        parts += ["", "Questions without a verdict; `--again` asks about them.", "", markdown.table(("judgement", "n", "reason"), failures)]
    if examples := [row for item in judgements if not item.protocol.swapped for row in _disagreements(item, verdicts[item])]:
        parts += ["", "Where judge and exact match differ:", "", markdown.table(_EXAMPLE_HEAD, examples)]
    return "\n".join([*parts, "", *(f"{_name(item)}: `{item.folder}`" for item in judgements)])


def _name(judgement: Judgement) -> str:
    protocol = judgement.protocol
    swapped = ", swapped" if protocol.swapped else ""
    return " ".join(f"{judgement.evaluation.name or judgement.evaluation}, {protocol.preset.name}{swapped}, {protocol.model}".split())


def _rates(judgement: Judgement, metrics: dict[str, Any], verdicts: Sequence[Judged]) -> Iterable[list[str]]:
    """Yield a row for all questions and, of several data sets, one for each."""
    sources: dict[str, dict[str, Any]] = metrics["by_data_source"]
    for name, measured in [("all", metrics), *(sources.items() if len(sources) > 1 else ())]:
        lost = sum(item.lost for item in verdicts if name == "all" or item.data_source == name)
        rates = [_rate(measured[rate]) for rate in ("accuracy", "published_accuracy", "em")]
        yield [_name(judgement), name, str(measured["n"]), str(measured["failed"]), str(lost), *rates]


def _rate(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})" if interval["n"] else ""


def _agreement(judgement: Judgement, metrics: dict[str, Any]) -> list[str]:
    *table, share, kappa = (metrics["agreement"][name] for name in (*_TABLE, "share", "kappa"))
    return [_name(judgement), *map(str, table), *("" if value is None else f"{value:.3f}" for value in (share, kappa))]


def _calibration(judgement: Judgement, metrics: dict[str, Any]) -> list[str]:
    calibration: dict[str, Any] = metrics.get("calibration", {"n": 0})
    scores = [f"{calibration[name]:.3f}" if name in calibration else "" for name in ("expected_error", "rms_error", "brier")]
    return [_name(judgement), str(calibration["n"]), str(metrics["unstated"]), *scores]


def _swaps(verdicts: dict[Judgement, list[Judged]]) -> Iterable[list[str]]:
    """Yield one row for each judgement that has a swapped one beside it."""
    swapped = {_asked(item): judged for item, judged in verdicts.items() if item.protocol.swapped}
    for item, judged in verdicts.items():
        if not item.protocol.swapped and _asked(item) in swapped:
            stays = stability(judged, swapped[_asked(item)], RESAMPLES, SEED)
            yield [_name(item), str(stays["stay"]["n"]), _rate(stays["stay"]), str(stays["to_right"]), str(stays["to_wrong"])]


def _asked(judgement: Judgement) -> tuple[Path, str, str]:
    return judgement.evaluation, judgement.protocol.preset.name, judgement.protocol.model


def _failures(judgement: Judgement, verdicts: Sequence[Judged]) -> Iterable[list[str]]:
    """Yield the most frequent reasons."""
    reasons = Counter(item.error for item in verdicts if item.error)
    for reason, count in reasons.most_common(_REASONS):
        yield [_name(judgement), str(count), _short(reason)]


def _disagreements(judgement: Judgement, verdicts: Sequence[Judged]) -> Iterable[list[str]]:
    """Yield the first answers that the judge alone calls right, and the first that exact match alone does."""
    judge_alone = [item for item in verdicts if item.correct is True and item.em != 1]
    em_alone = [item for item in verdicts if item.correct is False and item.em == 1]
    for item in (*judge_alone[:_EXAMPLES], *em_alone[:_EXAMPLES]):
        shown = (item.question, " | ".join(item.golden_answers), item.prediction, f"{item.em:.0f}", item.said, item.rationale)
        yield [_name(judgement), *map(_short, shown)]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
