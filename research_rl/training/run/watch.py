"""Rules over a run's step metrics that notice a collapse while it happens. Knows numbers and steps; knows no verl, no process.

Invariants: (1) a verdict depends on `watch` and on the metrics so far alone, so a run that resumes comes to the same one;
(2) a rule whose metric is not there is silent; (3) the first step in breach warns, and only `patience` further steps in
breach without a gap stop.

Rollouts of step n are played by the weights after step n - 1: metrics of a window that ends at step n speak of the
checkpoints from n - window to n - 1. A checkpoint is good when it is older than that and the episodes it played earned at
least half of what the best step earned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from research_rl.config import WatchConfig, WatchRule
from research_rl.errors import CollapseError
from research_rl.training.run import checkpoints
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.watch_rules import NOT_FINITE, RULES, Rows, Rule

__all__ = ["Finding", "collapse", "good", "keep_good", "levels", "not_finite", "restore", "verdicts"]

_POINTER = "good.json"
_ENOUGH = 0.5
_SPOKEN = ("actor/", "critic/")


@dataclass(frozen=True)
class Finding:
    """A rule in breach: since which step, by which value; `stops` once its patience is used up."""

    rule: str
    step: int
    since: int
    window: int
    value: float
    limit: float
    text: str
    remedy: str
    action: Literal["warn", "stop"]
    stops: bool

    @property
    def good_step(self) -> int:
        """The newest step whose checkpoint no metric in breach speaks of."""
        return max(0, self.since - self.window)


def not_finite(data: Mapping[str, Any]) -> dict[str, float]:
    """Return a metric for each of the update's numbers that is NaN or infinite: verl's log writes these as null."""
    return {f"{NOT_FINITE}{name}": 1.0 for name, value in data.items() if value is None and name.startswith(_SPOKEN)}


def verdicts(watch: WatchConfig, history: Mapping[int, Mapping[str, float]], step: int) -> list[Finding]:
    """Return the rules in breach at `step`, given each step's metrics; the ones that stop come first."""
    rows = [history[number] for number in sorted(history) if number <= step]
    findings = [_verdict(name, getattr(watch, name), rows, step) for name in RULES]
    return sorted((finding for finding in findings if finding), key=lambda finding: not finding.stops)


def levels(watch: WatchConfig, findings: Sequence[Finding]) -> dict[str, float]:
    """Return `watch/<rule>` for every rule that is on: 0 quiet, 1 warns, 2 stops."""
    quiet = {f"watch/{name}": 0.0 for name in RULES if getattr(watch, name).action != "ignore"}
    return {**quiet, **{f"watch/{finding.rule}": 1.0 + finding.stops for finding in findings}}


def _verdict(name: str, settings: WatchRule, rows: Rows, step: int) -> Finding | None:
    if settings.action == "ignore":
        return None
    rule = RULES[name]
    # Drawn lazily, newest first, and no further back than a verdict depends on.
    past = (_value(rule, settings, rows[:end]) for end in range(len(rows), max(0, len(rows) - settings.patience - 2), -1))
    breaches = list(takewhile(lambda value: value is not None and rule.breached(value, settings.limit), past))
    if not breaches or (value := breaches[0]) is None:
        return None
    run = len(breaches)
    stops, text = settings.action == "stop" and run > settings.patience, _text(name, rule, settings, rows, value)
    return Finding(name, step, step - run + 1, settings.window, value, settings.limit, text, rule.remedy, settings.action, stops)


def _value(rule: Rule, settings: WatchRule, rows: Rows) -> float | None:
    return rule.measure(rows, settings.window) if len(rows) >= settings.window else None


def _text(name: str, rule: Rule, settings: WatchRule, rows: Rows, value: float) -> str:
    broken = sorted(metric.removeprefix(NOT_FINITE) for metric in rows[-1] if metric.startswith(NOT_FINITE)) if name == "nan" else []
    which = f" ({', '.join(broken[:3])})" if broken else ""
    over = f" over {settings.window} steps" if settings.window > 1 else ""
    return f"{name}: {rule.text}{which} is {value:.4g}{over}, {rule.breach} the limit {settings.limit:g}"


def collapse(finding: Finding, last_good: Checkpoint | None) -> CollapseError:
    """Return the error that ends a run: rule, value, limit, step, last good checkpoint and remedy."""
    advice = f"{finding.remedy}. If this is no collapse: watch.{finding.rule}.action=warn, and the run goes on where it stands"
    if last_good is None:
        rescue = "no checkpoint from before stands (lower trainer.save_every to have one)"
    else:
        rescue = f"the last good checkpoint is of step {last_good.step} ({last_good.path}); train.steps={last_good.step} publishes it"
    return CollapseError(f"step {finding.step}: {finding.text}, since step {finding.since}; {rescue}. To train on: {advice}")


def keep_good(folder: Path, work: Path, findings: Sequence[Finding], history: Mapping[int, Mapping[str, float]]) -> Checkpoint | None:
    """Give the last good checkpoint of a run in breach a second name under `work`, where nothing prunes it, and return it.

    `good.json` beside it names its step and the reason; both go once no rule that may stop is in breach. Where retention has
    left nothing as old as that, it is the oldest checkpoint from before the breach.
    """
    grave = [finding for finding in findings if finding.action == "stop"]
    if not grave:
        shutil.rmtree(work / "good", ignore_errors=True)
        return None
    earliest = min(grave, key=lambda finding: finding.good_step)
    # What is kept is not replaced while the breach lasts: newer checkpoints come from after its beginning.
    if (standing := good(work)) and standing.step < earliest.since:
        return standing
    last_good = _last_good(folder, earliest, history)
    if last_good is None:
        return None
    _link(last_good, work / "good", {"step": last_good.step, "reason": earliest.text, "finding": asdict(earliest)})
    return good(work)


def _last_good(folder: Path, finding: Finding, history: Mapping[int, Mapping[str, float]]) -> Checkpoint | None:
    earned = {step: metrics.get("episode/reward", 0.0) for step, metrics in history.items()}
    enough = _ENOUGH * max(earned.values(), default=0.0)
    standing = [c for c in checkpoints.complete(folder) if c.step < finding.since and earned.get(c.step + 1, 0.0) >= enough]
    before = [checkpoint for checkpoint in standing if checkpoint.step <= finding.good_step]
    return before[-1] if before else standing[0] if standing else None


def good(work: Path) -> Checkpoint | None:
    """Return the checkpoint that `keep_good` kept, None when there is none."""
    try:
        step = int(json.loads((work / "good" / _POINTER).read_text())["step"])
    except FileNotFoundError:
        return None
    return Checkpoint(step, work / "good" / f"global_step_{step}")


def restore(folder: Path, work: Path) -> None:
    """Put the kept checkpoint back among the run's checkpoints when it was pruned there."""
    if (last_good := good(work)) and checkpoints.fault(folder / last_good.path.name) is not None:
        shutil.rmtree(folder / last_good.path.name, ignore_errors=True)
        checkpoints.link(last_good.path, folder / last_good.path.name)


def _link(checkpoint: Checkpoint, folder: Path, pointer: Mapping[str, Any]) -> None:
    """Replace `folder`; the pointer is written last, so that it never names half a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.link(checkpoint.path, folder / checkpoint.path.name)
    temporary = folder / f"{_POINTER}.{os.getpid()}"
    temporary.write_text(json.dumps(pointer, indent=1) + "\n")
    temporary.replace(folder / _POINTER)
