"""Build the trajectory viewer: one page, no network. Knows results and rollouts; leaves drawing to viewer.js.

Invariant: the page stays small however long the run was: questions, steps, rollouts and characters are bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from research_rl.evaluation.comparison import Pair, outcome
from research_rl.evaluation.results import Result
from research_rl.report import html

__all__ = ["evaluated", "rolled_out", "spread", "validated", "viewer"]

# Bounds of the page: the paper's run has 154 steps of 1,280 rollouts, which no browser opens as one page.
QUESTIONS = 180
STEPS = 12
QUESTIONS_PER_STEP = 4
VALIDATED_QUESTIONS = 24
ROLLOUTS_PER_QUESTION = 4
SEGMENT_CHARS = 4000

Group = dict[str, Any]


def viewer(groups: Sequence[Group], title: str) -> str:
    """Return the page of the groups that `evaluated` and `rolled_out` made."""
    script = (Path(__file__).parent / "viewer.js").read_text(encoding="utf-8")
    return html.render("trajectories.html.j2", title, script=script, groups=groups)


def evaluated(pairs: Sequence[Pair], limit: int = QUESTIONS) -> list[Group]:
    """Return one group a question with its trajectories before and after; wins, losses, ties and lost ones in equal parts if there are."""
    kinds = {name: [pair for pair in pairs if outcome(pair) == name] for name in ("win", "loss", "tie", "lost")}
    # In equal parts: after a good training wins are the many, losses what one wants to read.
    return [_pair_group(pair) for pair in _interleave(list(kinds.values()), limit)]


def validated(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Return one group a dev question with its greedy trajectory after every validated step; those whose reward moved most first."""
    groups: dict[str, Group] = {}
    for row in sorted((row for row in rows if "segments" in row), key=lambda row: int(row["step"])):
        # One group a question over all steps, so that its answers stand side by side.
        group = groups.setdefault(str(row.get("question", "")), _rollout_group(str(row.get("question", "")), row))
        group["items"].append({**_rollout(int(row["step"]), row), "phase": f"dev, after step {row['step']}", "kind": "dev"})
    return sorted(groups.values(), key=_moved, reverse=True)[:VALIDATED_QUESTIONS]


def _moved(group: Group) -> float:
    rewards = [item["reward"] for item in group["items"]]
    return max(rewards) - min(rewards)


def rolled_out(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Return groups of training rollouts: the first questions of each step in `rows`, some rollouts of each."""
    steps: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "segments" in row:
            steps.setdefault(int(row["step"]), {}).setdefault(str(row.get("question", "")), []).append(row)
    groups: dict[str, Group] = {}
    for step in sorted(steps):
        for question, rollouts in islice(steps[step].items(), QUESTIONS_PER_STEP):
            group = groups.setdefault(question, _rollout_group(question, rollouts[0]))
            group["items"] += [_rollout(step, row) for row in rollouts[:ROLLOUTS_PER_QUESTION]]
    return list(groups.values())


def spread(values: Sequence[int], count: int = STEPS) -> list[int]:
    """Return at most `count` of the values, evenly spread, the first and the last among them."""
    # First and last are always shown: what the policy could at the start and at the end.
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def _pair_group(pair: Pair) -> Group:
    before, after = pair
    return {
        "question": before.question,
        "golds": list(before.golden_answers),
        "source": before.data_source,
        "hops": before.hops,
        "outcome": outcome(pair),
        "items": [_result("before training", before), _result("after training", after)],
    }


def _result(phase: str, result: Result) -> dict[str, Any]:
    return {
        "phase": phase,
        "kind": phase,
        "reward": result.reward,
        "f1": result.f1,
        "fault": result.fault,
        "stop": result.stop,
        "searches": result.searches,
        "recall": result.recall,
        "tokens": result.tokens,
        "prediction": result.prediction,
        "error": result.trajectory["error"],
        "segments": _segments(result.trajectory["segments"]),
    }


def _rollout_group(question: str, row: dict[str, Any]) -> Group:
    return {
        "question": question,
        "golds": [str(gold) for gold in row.get("golds", [])],
        "source": str(row.get("data_source", "train")),
        "hops": 0,
        "outcome": "",
        "items": [],
    }


def _rollout(step: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "phase": f"step {step}, rollout {row.get('rollout', 0)}",
        "kind": f"step {step}",
        "reward": float(row.get("score", 0.0)),
        "f1": float(row.get("f1", 0.0)),
        "fault": str(row.get("reason", "ok")),
        "stop": str(row.get("stop", "unknown")),
        "searches": len(row.get("searches", [])),
        "recall": None,
        "tokens": int(row.get("model_tokens", 0)),
        "prediction": str(row.get("prediction", "")),
        "error": row.get("error"),
        "segments": _segments(row["segments"]),
    }


def _segments(segments: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [[str(segment["author"]), _cut(str(segment["text"]))] for segment in segments]


def _cut(text: str) -> str:
    return text if len(text) <= SEGMENT_CHARS else f"{text[:SEGMENT_CHARS]} […{len(text) - SEGMENT_CHARS} more characters]"


def _interleave(lists: Sequence[list[Pair]], limit: int) -> list[Pair]:
    """Take from each list in turn until all are empty or `limit` is reached."""
    longest = max((len(part) for part in lists), default=0)
    return [part[place] for place in range(longest) for part in lists if place < len(part)][:limit]
