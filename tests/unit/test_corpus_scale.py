"""A store of as many passages as the December 2018 Wikipedia has opens at once and holds next to no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from research_rl.corpus import store
from research_rl.pipeline import manifest

SHARD_ROWS = 500_000

OPEN = """
import json, sys, time
from pathlib import Path
import psutil
from research_rl.corpus.store import PassageStore
process, before = psutil.Process(), psutil.Process().memory_info().rss
started = time.perf_counter()
store = PassageStore(Path(sys.argv[1]))
opened = time.perf_counter() - started
open_rss = process.memory_info().rss - before
rows = [number * (len(store) - 1) // 999 for number in range(1000)]
started = time.perf_counter()
assert [int(passage.id) for passage in store.get(rows)] == rows
assert [store.row_of(str(row)) for row in rows] == rows
read = time.perf_counter() - started
print(json.dumps({"rows": len(store), "open_s": opened, "open_mib": open_rss / 2**20,
                  "read_us": read / 2000 * 1e6, "read_mib": (process.memory_info().rss - before) / 2**20}))
"""


def build(folder: Path, rows: int) -> None:
    """Publish a store whose ids are the row numbers."""
    hashes: list[store.Hashes] = []
    with manifest.publish(folder, "corpus", "x", {}) as staging:
        for start in range(0, rows, SHARD_ROWS):
            ids = pa.chunked_array([pa.array(np.arange(start, min(start + SHARD_ROWS, rows))).cast(pa.string())])
            contents = pc.binary_join_element_wise("passage", ids, " ")
            hashes.append(store.write_shard(ids, contents, staging.path / store.shard_name(len(hashes))))
        store.write_table(np.concatenate(hashes), staging.path)
        staging.counts |= {"passages": rows, "shards": len(hashes)}
        staging.facts["shard_rows"] = SHARD_ROWS


def measured(folder: Path) -> dict[str, float]:
    """Open the store in a process of its own and read 1,000 rows by number and by id."""
    found = subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


@pytest.mark.parametrize("rows", [200_000, pytest.param(21_015_324, marks=pytest.mark.long)])
def test_a_store_opens_at_once_with_almost_no_memory(tmp_path: Path, rows: int) -> None:
    build(tmp_path / "corpus", rows)
    found = measured(tmp_path / "corpus")
    print(found)
    assert found["rows"] == rows
    assert found["open_s"] < 1.0
    assert found["open_mib"] < 16
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
