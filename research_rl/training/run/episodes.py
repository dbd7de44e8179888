"""The record of one training episode, and the metrics of a step's episodes. Knows JSON lines; knows no verl.

The agent workers append records while a step runs; the supervisor gathers them when the step is done. Every stop reason
is a metric of its own, and they sum to 1.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from research_rl.episode.trajectory import Author, SearchFault, StopReason, Trajectory
from research_rl.pipeline import json_lines
from research_rl.reward.rules import Grade

__all__ = ["DEV", "TRAIN", "append", "discard", "discard_after", "gather", "losses", "record", "steps", "summarise"]

TRAIN, DEV = "train", "dev"


def record(trajectory: Trajectory, grade: Grade) -> dict[str, Any]:
    """Return what is kept of one graded episode: segments, searches, grade and token counts."""
    tokens = {author: sum(len(s.ids) for s in trajectory.segments if s.author is author) for author in Author}
    return {
        "score": grade.score,
        "f1": grade.f1,
        "em": grade.em,
        "format_ok": grade.format_ok,
        "reason": grade.reason,
        "prediction": grade.prediction,
        "parts": grade.parts,
        "suspicion": grade.suspicion,
        "judge": grade.judge,
        "prompt_tokens": len(trajectory.prompt_ids),
        "model_tokens": tokens[Author.MODEL],
        "result_tokens": tokens[Author.SEARCH],
        **trajectory.to_json(),
    }


def append(folder: Path, step: int, split: str, row: dict[str, Any]) -> None:
    """Add one record to this process's file of the step."""
    json_lines.append(json_lines.own_file(folder / (TRAIN if split == TRAIN else DEV) / f"{step:06d}"), row)


def steps(folder: Path) -> list[int]:
    """Return the steps that have training episodes, in order."""
    return sorted(int(path.name) for path in (folder / TRAIN).glob("[0-9]*"))


def gather(folder: Path, step: int, split: str = TRAIN) -> list[dict[str, Any]]:
    """Return a step's episodes of a split, ordered by question and rollout; a line cut by a crash is left out."""
    rows = [row for part in sorted((folder / split / f"{step:06d}").glob("*.jsonl")) for row in _rows(part)]
    return sorted(rows, key=lambda row: (str(row["id"]), str(row["uid"]), int(row["rollout"])))


def discard_after(folder: Path, step: int) -> None:
    """Remove episodes of later steps: they are about to be played again."""
    for split in (TRAIN, DEV):
        for path in (folder / split).glob("[0-9]*"):
            if int(path.name) > step:
                shutil.rmtree(path)


def discard(folder: Path, step: int, split: str = TRAIN) -> None:
    """Remove a step's episodes of a split once they are kept elsewhere."""
    shutil.rmtree(folder / split / f"{step:06d}", ignore_errors=True)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return a step's means under `episode/`: reward, F1, EM, format, searches, tokens and the share of each stop reason.

    `episode/search_failed/<fault>` and `search/<count of the client>` are numbers of searches, not means.
    """
    if not rows:
        return {}
    metrics = {f"episode/{name}": _mean([float(row[field]) for row in rows]) for name, field in _FIELDS.items()}
    metrics["episode/searches"] = _mean([float(len(row["searches"])) for row in rows])
    metrics["episode/failed_searches"] = _mean([float(sum(search["error"] is not None for search in row["searches"])) for row in rows])
    faults = Counter(str(search.get("fault")) for row in rows for search in row["searches"])
    metrics.update({f"episode/search_failed/{fault.value}": float(faults[fault.value]) for fault in SearchFault})
    # Each row has what its worker counted since its row before, so the sum is the step's.
    client = sum((Counter(row.get("client", {})) for row in rows), Counter[str]())
    metrics.update({f"search/{name}": float(count) for name, count in client.items()})
    for reason in StopReason:
        metrics[f"episode/stop/{reason.value}"] = _mean([float(row["stop"] == reason.value) for row in rows])
    metrics |= _parts(rows)
    metrics["episode/reward_std"] = pstdev(float(row["score"]) for row in rows)
    metrics["episode/empty_searches"] = _mean([float(empty) for row in rows for empty in _empty_replies(row)])
    metrics["episode/mixed_groups"], metrics["episode/flat_groups"] = _groups(rows)
    metrics["episode/count"] = float(len(rows))
    return metrics


def played_groups(rows: Sequence[dict[str, Any]], prompts: int) -> int:
    """Return how many groups a step played: its questions, and those that dynamic sampling played beyond them."""
    return max(prompts, len({str(row["uid"]) for row in rows}))


def losses(rows: Sequence[dict[str, Any]], prompts: int, group: int) -> dict[str, float]:
    """Return how many of a step's trajectories and groups are not there whole."""
    whole = sum(size >= group for size in Counter(str(row["uid"]) for row in rows).values())
    played = played_groups(rows, prompts)
    return {"episode/lost": float(played * group - len(rows)), "episode/lost_groups": float(played - whole)}


def filtered(metrics: Mapping[str, float], groups: int) -> dict[str, float]:
    """Return which shares of a step's `groups` verl's counts say were not trained on: without a spread, and more than needed."""
    return {
        "episode/filtered_groups": metrics.get("training/filter_groups/evicted_samples", 0.0) / groups,
        "episode/surplus_groups": metrics.get("training/filter_groups/discarded_surplus_samples", 0.0) / groups,
    }


_FIELDS = {
    "reward": "score",
    "f1": "f1",
    "em": "em",
    "format": "format_ok",
    "prompt_tokens": "prompt_tokens",
    "model_tokens": "model_tokens",
    "result_tokens": "result_tokens",
    "engine_s": "engine_seconds",
    "search_s": "search_seconds",
}


def _parts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the means of the reward's parts, which sum to the reward, the share of suspect answers and of failed judgements."""
    names = dict.fromkeys(name for row in rows for name in row.get("parts", {}))
    metrics = {f"episode/reward/{name}": _mean([float(row.get("parts", {}).get(name, 0.0)) for row in rows]) for name in names}
    metrics["episode/suspect"] = _mean([float(row.get("suspicion") is not None) for row in rows])
    judged = [str(row["judge"]) for row in rows if row.get("judge") is not None]
    if judged:
        metrics["episode/judged"] = len(judged) / len(rows)
        metrics["episode/judge_failed"] = _mean([float(word != "asked") for word in judged])
    return metrics


def _groups(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return two shares of the questions: whose rollouts differ in reward (only these carry a gradient in GRPO), and whose
    rollouts all earn the same without all being right."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(str(row["uid"]), []).append((float(row["score"]), float(row["f1"])))
    mixed = [len({score for score, _ in group}) > 1 for group in groups.values()]
    solved = [all(f1 == 1.0 for _, f1 in group) for group in groups.values()]
    flat = [not differs and not right for differs, right in zip(mixed, solved, strict=True)]
    return _mean([float(value) for value in mixed]), _mean([float(value) for value in flat])


def _empty_replies(row: dict[str, Any]) -> list[bool]:
    """Return for each search that got an answer whether no passage text came with it."""
    faults = [search.get("fault") for search in row["searches"]]
    return [fault == SearchFault.NOTHING.value for fault in faults if fault in (None, SearchFault.NOTHING.value)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in json_lines.read(path)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
