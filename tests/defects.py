"""A small clean snapshot in FlashRAG's format, and the same with defects put in. Knows files and rows; knows no suite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent

Snapshot = dict[str, list[dict[str, Any]]]

COLOURS = ("amber", "blue", "coral", "denim", "ebony", "flax", "grey", "henna", "indigo", "jade")
TREES = ("alder", "birch", "cedar", "elm", "fir", "gorse", "hazel", "juniper", "larch", "maple")


def snapshot(passages: int = 200, questions: int = 40) -> Snapshot:
    """Return a corpus and three sets that pass every check; no two questions share a name."""
    corpus = [
        {"id": f"p{n}", "contents": f"Village {n}\nThe banner of Village{n} is {_colour(n)} and its tree the {_tree(n)}."}
        for n in range(passages)
    ]
    sets = {name: [_question(name, n + start) for n in range(questions)] for name, start in (("train", 0), ("dev", 60), ("test", 120))}
    return {"corpus": corpus, **sets}


def _question(split: str, n: int) -> dict[str, Any]:
    text = f"Which banner flies in the square of Village{n}, near Lake{n * 7 + 1}?"
    return {"id": f"{split}{n}", "question": text, "golden_answers": [_colour(n)], "metadata": {"supporting_passage_ids": [f"p{n}"]}}


def _colour(n: int) -> str:
    return COLOURS[n % 10] + COLOURS[n // 10 % 10]


def _tree(n: int) -> str:
    return TREES[n % 10] + TREES[n // 10 % 10]


def _set(name: str, row: int, **fields: Any) -> Callable[[Snapshot], object]:
    return lambda data: data[name][row].update(fields)


def _copy(source: str, row: int, target: str, place: int, *fields: str) -> Callable[[Snapshot], object]:
    return lambda data: data[target][place].update({name: data[source][row][name] for name in fields})


def _spoil(text: str, rows: int = 5) -> Callable[[Snapshot], object]:
    return lambda data: [row.update(contents=row["contents"] + text) for row in data["corpus"][:rows]]


DEFECTS: dict[str, tuple[str, str, Callable[[Snapshot], object]]] = {
    "passages repeated": (
        "corpus", "repeated_contents", lambda data: [row.update(contents=data["corpus"][0]["contents"]) for row in data["corpus"][1:5]],
    ),
    "passage too long": ("corpus", "overlong", _set("corpus", 9, contents="T\n" + "word " * 5000)),
    "passages misread": ("corpus", "mojibake", _spoil(" CafÃ©")),
    "passages undecodable": ("corpus", "replacement", _spoil(" caf\ufffd")),
    "passages with control characters": ("corpus", "control", _spoil(" a\x07b")),
    "passages without words": ("corpus", "wordless", lambda data: [row.update(contents="…\n— !") for row in data["corpus"][7:9]]),
    "answer is the question": (
        "train", "echo", _set("train", 3, golden_answers=["which banner flies in the square of VILLAGE3 near Lake22"]),
    ),
    "answer too long": ("dev", "longest_answer", _set("dev", 1, golden_answers=["x" * 1001])),
    "question too long": ("test", "chars", _set("test", 2, question="why " * 1001)),
    "question undecodable": ("train", "replacement", _set("train", 5, question="Which \ufffd flies in Village5?")),
    "question misread": ("train", "mojibake", _set("train", 6, question="Which cafÃ© stands in Village6?")),
    "question with control characters": ("dev", "control", _set("dev", 5, question="Which\x00banner flies in Village65?")),
    "train question in test": ("test", "leaked", _copy("train", 0, "test", 0, "question")),
    "train question nearly in test": (
        "test", "near", _set("test", 1, question="In Village1, near Lake8, which banner flies in the square?"),
    ),
    "answers nowhere": ("test", "answered", lambda data: [row.update(golden_answers=["Zanzibar"]) for row in data["test"][:25]]),
    "support not in the corpus": ("dev", "unknown_support", _set("dev", 7, metadata={"supporting_passage_ids": ["p999"]})),
}  # fmt: skip
"""By name: the suite and the column that must break, and what breaks them; each leaves the rest as it is."""


def write(data: Snapshot, folder: Path) -> Path:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def context(root: Path, data: Snapshot, source: str = "s", edit: Callable[[Path], object] = silent, **limits: Any) -> Context:  # type: ignore[assignment]
    """Publish `data` as a download of configuration `source`, `edit` its files, and return the context of validate."""
    workspace = Workspace(root)
    with manifest.publish(workspace.folder("download"), "download", source, {}) as staging:
        write(data, staging.path)
        if edit is not silent:
            edit(staging.path)
        staging.counts |= {name: len(rows) for name, rows in data.items()}
    parents = {"download": manifest.load(workspace.folder("download"))}
    return Context(STAGES["validate"], Config.model_validate({"validation": limits}), workspace, parents, silent)
