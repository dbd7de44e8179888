"""Stage corpus: turn the checked corpus file into the passage store, shard by shard.

Invariants: (1) a killed run redoes at most the shard it was in; (2) memory is that of one shard, and eight bytes a passage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from research_rl.corpus import store
from research_rl.data.download import CORPUS
from research_rl.errors import DataError
from research_rl.pipeline import arrays
from research_rl.pipeline.copying import place
from research_rl.pipeline.stages import Context
from research_rl.pipeline.work import Work

__all__ = ["run", "shard"]

_BLOCK_ROWS = 4096
_HASHES = "hashes.npy"


def run(context: Context) -> None:
    """Publish the passage store; counts hold `passages` and `shards`. Raises DataError for a bad line."""
    rows, work = context.config.corpus.shard_rows, Work(context)
    shards = list(_shards(context, context.parent("download") / CORPUS, work, rows))
    with context.publish() as staging:
        for name, _ in shards:
            # Linked, not moved: a kill before the end of publication leaves the shards in the work folder for the next run.
            place(work.folder / name / name, staging.path / name)
        store.write_table(np.concatenate([np.load(work.folder / name / _HASHES) for name, _ in shards]), staging.path)
        staging.counts |= {"passages": sum(count for _, count in shards), "shards": len(shards)}
        staging.facts["shard_rows"] = rows
    work.remove()


def _shards(context: Context, corpus: Path, work: Work, rows: int) -> Iterator[tuple[str, int]]:
    """Yield file name and rows of every shard, built unless a finished one stands."""
    total, done, end = context.parents["download"].counts["corpus"], 0, 0
    with corpus.open("rb", buffering=1 << 20) as stream:
        while end < os.fstat(stream.fileno()).st_size:
            name = store.shard_name(done // rows)
            record = work.unit(name, partial(shard, stream, end, done, rows, name))
            # The record says where the next shard begins, so that a finished one is passed over without reading its lines again.
            done, end = done + record["rows"], record["end"]
            context.progress(f"{done:,} of {total:,} passages", done / max(total, 1))
            yield name, record["rows"]


def shard(stream: BinaryIO, begin: int, first: int, rows: int, name: str, folder: Path) -> dict[str, int]:
    """Write the shard of the next `rows` lines and the hashes of its ids; return its rows and where the next shard begins."""
    stream.seek(begin)
    table, end = _read(stream, first, rows)
    arrays.save(folder / _HASHES, store.write_shard(table.column("id"), table.column("contents"), folder / name))
    return {"rows": len(table), "end": end}


def _read(stream: BinaryIO, first: int, rows: int) -> tuple[Any, int]:
    """Return the next `rows` lines as a table of ids and contents, and where they end in the file."""
    import pyarrow as pa

    end, tables = stream.tell(), list[Any]()
    while rows and (lines := list(islice(stream, min(rows, _BLOCK_ROWS)))):
        tables.append(_parse(lines, first, stream.name))
        end, first, rows = end + sum(map(len, lines)), first + len(lines), rows - len(lines)
    return pa.concat_tables(tables), end


def _parse(lines: list[bytes], first: int, name: str) -> Any:
    """Parse lines that the download stage wrote; one that it cannot have written is refused."""
    import pyarrow as pa
    from pyarrow import json as arrow

    block = b"".join(lines)
    # One block for all lines: Arrow refuses a line that lies across the border of two.
    options = arrow.ReadOptions(use_threads=False, block_size=len(block) + 1)
    schema = pa.schema({"id": pa.string(), "contents": pa.string()})
    try:
        table = arrow.read_json(pa.BufferReader(block), options, arrow.ParseOptions(explicit_schema=schema))
        # Arrow passes over blank lines and takes a missing field for null.
        if len(table) == len(lines) and not table.column("id").null_count and not table.column("contents").null_count:
            return table
        problem = "a field or a line is missing"
    except pa.ArrowInvalid as error:
        problem = str(error)
    where = f"{name}: lines {first + 1:,} to {first + len(lines):,}"
    raise DataError(f"{where} are not as the download stage writes them ({problem}); run `research run download --force`")
