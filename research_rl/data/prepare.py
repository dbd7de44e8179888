"""Stage prepare: turn question files into the trainer's parquet rows. Knows columns and row order; knows no tokenizer.

Invariants: (1) equal questions, seed and limits give equal bytes; (2) one row group order for every reader:
`extra_info.index` is the row's place in its file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research_rl.data import flashrag
from research_rl.data.download import GENERATED, SPLITS
from research_rl.data.flashrag import Question
from research_rl.pipeline.stages import Context

__all__ = ["run", "shuffled", "to_row"]


def run(context: Context) -> None:
    """Publish train.parquet, dev.parquet and test.parquet; counts hold rows kept and rows seen."""
    source, limits = context.parent("download"), context.config.prepare
    with context.publish() as staging:
        for done, split in enumerate(SPLITS):
            questions = list(flashrag.read_questions(source / f"{split}.jsonl"))
            # Shuffled before it is cut: a file holds the questions of one set behind those of another.
            chosen = shuffled(questions, f"{context.config.data_seed}/{split}")[: getattr(limits, f"{split}_rows")]
            _write([to_row(question, split, index) for index, question in enumerate(chosen)], staging.path / f"{split}.parquet")
            staging.counts |= {split: len(chosen), f"{split}_available": len(questions)}
            context.progress(f"{split}: {len(chosen):,} of {len(questions):,} questions", (done + 1) / len(SPLITS))


def shuffled(questions: Sequence[Question], seed: str) -> list[Question]:
    """Return the questions in an order that depends on `seed` alone."""
    return random.Random(seed).sample(questions, len(questions))


def to_row(question: Question, split: str, index: int) -> dict[str, Any]:
    """Return one row in verl's columns, and in FlashRAG's beside them.

    `prompt` holds the bare question, the template is applied by the agent.
    """
    return {
        "data_source": str(question.metadata.get("data_source", GENERATED)),
        "prompt": [{"role": "user", "content": question.question}],
        "ability": "qa",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(question.golden_answers)}},
        "extra_info": {
            "index": index,
            "split": split,
            "id": question.id,
            "question": question.question,
            "golden_answers": list(question.golden_answers),
            "supporting_passage_ids": flashrag.supporting_ids(question),
        },
        "question": question.question,
        "id": question.id,
        "golden_answers": list(question.golden_answers),
    }


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows with a fixed schema, so that an empty list column keeps its type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": pa.struct({"target": texts})}),
            "extra_info": pa.struct(
                {
                    "index": pa.int64(),
                    "split": text,
                    "id": text,
                    "question": text,
                    "golden_answers": texts,
                    "supporting_passage_ids": texts,
                }
            ),
            "question": text,
            "id": text,
            "golden_answers": texts,
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
