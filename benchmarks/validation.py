"""P14: judging a corpus by the stage validate against Great Expectations on a pandas frame of the whole, with the same checks.

Both read the same generated file in a process of their own. `python -m benchmarks.validation scale ROWS` measures the stage's
reading alone, at any size, and how its memory grows.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.duel import Duel, alternate, cpu_seconds

WIKI18 = 21_015_324
_WORDS = 90
_TEXTS = 20_000


def run(quick: bool) -> Iterator[Duel]:
    """Yield rows per CPU-second, and peak memory (smaller is better)."""
    rows, rounds = (100_000, 1) if quick else (400_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = generate(Path(folder) / "corpus.jsonl", rows)
        measured: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}

        def side(name: str) -> Callable[[], float]:
            def measure() -> float:
                measured[name].append(_apart(name, path))
                return measured[name][-1]["rate"]

            return measure

        what = f"schema and quality of {rows:,} passages against Great Expectations on the whole frame"
        yield alternate("P14", what, "rows per CPU-second", side("ours"), side("peer"), 1.0, rounds)
        peaks = {name: max(item["peak_mib"] for item in found) for name, found in measured.items()}
        yield Duel(
            "P14", f"peak memory at {rows:,} passages", "MiB", peaks["ours"], peaks["peer"], peaks["peer"] / peaks["ours"], 1.0, rounds
        )


def generate(path: Path, rows: int, seed: int = 1) -> Path:
    """Write a corpus of about Wikipedia's passage length; a fifth of the rows hold letters outside ASCII, every row differs."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    texts = [" ".join(draw.choices(vocabulary, k=_WORDS)) + (" café São" if n % 5 == 0 else "") for n in range(_TEXTS)]
    with path.open("w", encoding="utf-8", buffering=1 << 20) as stream:
        for row in range(rows):
            stream.write(f'{{"id": "{row}", "contents": "Title {row}\\n{texts[row % _TEXTS]}."}}\n')
    return path


def _apart(side: str, path: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.validation", side, path], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(path: Path) -> int:
    """Judge the corpus as the stage does; return its rows."""
    from research_rl.config import ValidationConfig
    from research_rl.validation.answers import Sought
    from research_rl.validation.corpus import measure_corpus
    from research_rl.validation.suites import check, corpus_frames

    limits = ValidationConfig()
    found = measure_corpus(path, Sought.of((), ()), limits.max_passage_chars, path.parent / "scratch", lambda rows: None)
    failed = [item for item in check(corpus_frames(found, limits), path.parent / "docs") if not item.passed]
    assert not failed, failed
    return found.rows


def peer(path: Path) -> int:
    """Judge the corpus by the same expectations on a frame of all rows; return its rows."""
    import unicodedata

    import great_expectations as gx
    import great_expectations.expectations as e
    import pandas as pd

    frame = pd.read_json(path, lines=True, dtype={"id": str, "contents": str})
    frame["normal"] = [unicodedata.is_normalized("NFC", text) for text in frame["contents"]]
    frame["words"] = frame["contents"].str.count(r"\w+")
    frame["key"] = frame["contents"].str.lower().str.replace(r"\W+", " ", regex=True)
    unwanted = ("\ufffd", r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]", "[ÂÃ][\x80-\xbf]|â€[\x80-\xbf]|ï»¿")
    suite = gx.ExpectationSuite(
        name="corpus",
        expectations=[
            e.ExpectTableColumnsToMatchSet(column_set=["id", "contents", "normal", "words", "key"]),
            e.ExpectColumnValuesToNotBeNull(column="id"),
            e.ExpectColumnValueLengthsToBeBetween(column="id", min_value=1),
            e.ExpectColumnValuesToBeUnique(column="id"),
            e.ExpectColumnValueLengthsToBeBetween(column="contents", min_value=1, max_value=20_000),
            e.ExpectColumnValuesToBeUnique(column="key", mostly=0.99),
            *(e.ExpectColumnValuesToNotMatchRegex(column="contents", regex=regex) for regex in unwanted),
            e.ExpectColumnValuesToMatchRegex(column="contents", regex=r"(?s).*\n"),
            e.ExpectColumnValuesToBeBetween(column="words", min_value=1),
            e.ExpectColumnQuantileValuesToBeBetween(
                column="words", quantile_ranges={"quantiles": [0.05, 0.5, 0.95], "value_ranges": [[None, None]] * 3}
            ),
            e.ExpectColumnValuesToBeInSet(column="normal", value_set=[True]),
        ],
    )
    context = gx.get_context(mode="ephemeral")
    batch = context.data_sources.add_pandas("p").add_dataframe_asset("a").add_batch_definition_whole_dataframe("b")
    result = batch.get_batch({"dataframe": frame}).validate(suite)
    assert result.success, [item.expectation_config for item in result.results if not item.success]
    return len(frame)


def scale(rows: int) -> dict[str, float]:
    """Read a corpus of `rows` passages; return the rate, the peak of all processes, and memory's growth in bytes a row."""
    from research_rl.validation.answers import Sought
    from research_rl.validation.corpus import measure_corpus

    samples: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = generate(Path(folder) / "corpus.jsonl", rows)
        answers = [f"Title {row}" for row in range(0, 2 * rows, max(1, rows // 2500))]
        with _Peak() as peak:
            started, wall = cpu_seconds(), time.perf_counter()
            found = measure_corpus(
                path, Sought.of(answers, ["1"]), 20_000, Path(folder) / "scratch", lambda seen: samples.append((seen, peak.take()))
            )
            used, wall = cpu_seconds() - started, time.perf_counter() - wall
    assert found.rows == rows and found.defects["repeated_ids"] == found.defects["repeated_contents"] == 0
    return {
        "rows": rows,
        "rows_per_cpu_second": rows / used,
        "cpu_s": used,
        "wall_s": wall,
        "peak_mib": peak.highest / 2**20,
        "bytes_a_row": _slope(samples[len(samples) // 4 :]),
        "wiki18_cpu_s": WIKI18 * used / rows,
    }


def _slope(samples: list[tuple[int, int]]) -> float:
    import numpy as np

    rows, sizes = np.array(samples, float).T
    return float(np.polyfit(rows, sizes, 1)[0])


class _Peak:
    """Samples the resident memory of this process and its children."""

    def __init__(self) -> None:
        self.highest = 0
        self._done = threading.Event()

    def take(self) -> int:
        import psutil

        own = psutil.Process()
        size = 0
        for process in (own, *own.children(recursive=True)):
            try:
                size += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.highest = max(self.highest, size)
        return size

    def __enter__(self) -> _Peak:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.take()


def main(side: str, argument: str) -> dict[str, Any]:
    """Measure one side in this process."""
    if side == "scale":
        return scale(int(argument))
    work = {"ours": ours, "peer": peer}[side]
    with _Peak() as peak:
        started = cpu_seconds()
        rows = work(Path(argument))
        used = cpu_seconds() - started
    return {"rate": rows / used, "peak_mib": peak.highest / 2**20}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
