"""The training rows hold verl's columns, follow the seed alone and are equal bytes for equal input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from research_rl.config import Config
from research_rl.data import prepare
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent


def context(root: Path, **tree: Any) -> Context:
    workspace = Workspace(root)
    for stage in ("download", "validate"):
        with manifest.publish(workspace.folder(stage), stage, "x", {}) as staging:
            for split, rows in (("train", 20), ("dev", 8), ("test", 6)) if stage == "download" else ():
                text = "".join(json.dumps(question(split, n)) + "\n" for n in range(rows))
                (staging.path / f"{split}.jsonl").write_text(text)
    parents = {name: manifest.load(workspace.folder(name)) for name in ("download", "validate")}
    return Context(STAGES["prepare"], Config.model_validate(tree), workspace, parents, silent)


def question(split: str, n: int) -> dict[str, Any]:
    metadata = {"data_source": "musique", "supporting_passage_ids": ["4", "9"]} if n % 2 else {}
    return {"id": f"{split}_{n}", "question": f"Who is {n}?", "golden_answers": ["Ada", f"A{n}"], "metadata": metadata}


def test_rows_have_the_trainers_columns(tmp_path: Path) -> None:
    made = context(tmp_path, prepare={"dev_rows": 5})
    prepare.run(made)
    rows = pq.read_table(made.workspace.folder("prepare") / "dev.parquet").to_pylist()
    assert manifest.load(made.workspace.folder("prepare")).counts == {
        "train": 20, "train_available": 20, "dev": 5, "dev_available": 8, "test": 6, "test_available": 6,
    }  # fmt: skip
    assert [row["extra_info"]["index"] for row in rows] == list(range(5))
    row = next(row for row in rows if row["extra_info"]["id"] == "dev_1" or row["data_source"] == "musique")
    n = row["extra_info"]["id"].split("_")[1]
    assert row == {
        "data_source": "musique",
        "prompt": [{"role": "user", "content": f"Who is {n}?"}],
        "ability": "qa",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", f"A{n}"]}},
        "extra_info": {
            "index": row["extra_info"]["index"], "split": "dev", "id": f"dev_{n}", "question": f"Who is {n}?",
            "golden_answers": ["Ada", f"A{n}"], "supporting_passage_ids": ["4", "9"],
        },
        "question": f"Who is {n}?", "id": f"dev_{n}", "golden_answers": ["Ada", f"A{n}"],
    }  # fmt: skip
    assert {row["data_source"] for row in rows} <= {"musique", "encyclopedia"}


def test_equal_seed_gives_equal_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    found: dict[str, bytes] = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = context(tmp_path / name, seed=seed)
        prepare.run(made)
        found[name] = (made.workspace.folder("prepare") / "train.parquet").read_bytes()
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
