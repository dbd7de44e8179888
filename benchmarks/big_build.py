"""Build embeddings and index of many generated passages in a small memory budget, killed half-way and resumed.

`python -m benchmarks.big_build --rows 1000000 --folder DIR` prints one JSON line: what the plan said and what was measured,
files redone after each kill, and whether memory and time were within a quarter of the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from research_rl import config as configuration
from research_rl.config import Config, config_hash
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Workspace, measured
from research_rl.planning import knowledge

OVERRIDES = ("encoder.kind=lexical", "encoder.dim=384", "index.memory_gib=2", "index.factory=Flat")
WORDS, VOCABULARY = 60, 200_000
KILL_AT = 0.5


def main() -> int:
    """Run it; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser("python -m benchmarks.big_build", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="workspace to build in; about 5 GB for a million passages")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    workspace = Workspace(arguments.folder.resolve())
    config = configuration.load_profile("laptop", [*OVERRIDES, *arguments.overrides])
    prepare(config, workspace, arguments.rows)
    run(workspace, "corpus")
    plan = {item.stage: item for item in knowledge.estimates(config, workspace, arguments.rows)}
    result = {"rows": arguments.rows, **{stage: killed_and_resumed(workspace, stage) for stage in ("embed", "index")}}
    print(json.dumps(verdict(config, result, plan)))
    return 0 if result["holds"] else 1


def verdict(config: Config, result: dict[str, Any], plan: dict[str, knowledge.ResourceEstimate]) -> dict[str, Any]:
    """Add planned figures, their ratios to the measured ones, and whether every promise held."""
    for stage in ("embed", "index"):
        result[stage] |= {"planned_mib": round(plan[stage].memory / 2**20), "planned_cpu_s": round(plan[stage].seconds, 1)}
    seconds = sum(result[stage]["cpu_s"] for stage in ("embed", "index"))
    planned_seconds = sum(plan[stage].seconds for stage in ("embed", "index"))
    peak = max(result[stage]["peak_mib"] for stage in ("embed", "index"))
    planned_peak = max(plan[stage].memory for stage in ("embed", "index")) / 2**20
    result |= {
        "peak_mib": peak,
        "memory_ratio": round(peak / planned_peak, 3),
        "cpu_s": round(seconds, 1),
        "time_ratio": round(seconds / planned_seconds, 3),
        "redone": max(result[stage]["redone"] for stage in ("embed", "index")),
    }
    near = all(0.75 <= result[name] <= 1.25 for name in ("memory_ratio", "time_ratio"))
    result["holds"] = near and peak <= config.index.memory_gib * 1024 and result["redone"] <= 1
    return result


def prepare(config: Config, workspace: Workspace, rows: int) -> None:
    """Write params.yaml and, in place of download and validate, artifacts with generated passages."""
    shutil.rmtree(workspace.root, ignore_errors=True)
    workspace.root.mkdir(parents=True)
    configuration.save(config, workspace.root / "params.yaml")
    with manifest.publish(workspace.folder("download"), "download", config_hash(config, STAGES["download"].sections), {}) as staging:
        staging.counts["corpus"] = rows
        with (staging.path / "corpus.jsonl").open("w") as stream:
            stream.writelines(passages(rows))
    parents = {"download": manifest.load(workspace.folder("download"))}
    with manifest.publish(workspace.folder("validate"), "validate", config_hash(config, STAGES["validate"].sections), parents):
        pass


def passages(rows: int) -> Iterator[str]:
    """Yield JSON lines of passages whose words are spread as in natural text (Zipf), each with a name of its own."""
    generator = np.random.default_rng(0)
    words = np.array([f"{'bcdfglmnprst'[n % 12]}{'aeiou'[n // 12 % 5]}{n:x}" for n in range(VOCABULARY)])
    for start in range(0, rows, 1000):
        ranks = np.minimum(generator.zipf(1.25, (min(1000, rows - start), WORDS)), VOCABULARY) - 1
        for number, row in enumerate(words[ranks], start):
            yield json.dumps({"id": str(number), "contents": f'"Entry {number}"\nEntry{number} {" ".join(row)}.'}) + "\n"


def killed_and_resumed(workspace: Workspace, stage: str) -> dict[str, Any]:
    """Kill a stage by SIGKILL when half of its files are done, run it again, and return what both runs took."""
    spent = cpu()
    process = start(workspace, stage)
    work = workspace.root / "artifacts" / ".work"
    total = files_wanted(workspace, stage)
    while len(done(work, stage)) < total * KILL_AT:
        time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit(f"{stage} ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(work, stage)
    whole = {path: path.stat().st_mtime_ns for path in before}
    redone: set[str] = set()
    process = start(workspace, stage)
    while process.poll() is None:
        redone |= {path.name for path, when in whole.items() if path.exists() and path.stat().st_mtime_ns != when}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{stage} failed after it was resumed")
    took = measured(workspace, manifest.load(workspace.folder(stage), verify=False))
    return {
        "files": total,
        "done_when_killed": len(before),
        "redone": len(redone) + 1,  # and the file it was in
        "cpu_s": round(cpu() - spent, 1),
        "peak_mib": took["peak_mib"],
        "resumed_run_s": took["seconds"],
    }


def files_wanted(workspace: Workspace, stage: str) -> int:
    """Return how many files a stage makes."""
    config = configuration.load(workspace.root / "params.yaml")
    rows = manifest.load(workspace.folder("corpus"), verify=False).counts["passages"]
    if stage == "embed":
        return -(-rows // config.encoder.shard_rows)
    from research_rl.index import budget

    return -(-rows // budget.shard_rows(config.index, config.encoder.dim, rows))


def done(work: Path, stage: str) -> list[Path]:
    """Return the records of finished files."""
    pattern = "vectors-*.json" if stage == "embed" else "dense-*.json"
    return sorted(work.glob(f"{stage}-*/{pattern}"))


def start(workspace: Workspace, stage: str) -> subprocess.Popen[bytes]:
    """Start a stage as a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "research_rl", "run", stage, "-w", str(workspace.root)], stdout=sys.stderr)


def run(workspace: Workspace, stage: str) -> None:
    """Run a stage to its end."""
    if start(workspace, stage).wait():
        raise SystemExit(f"{stage} failed")


def cpu() -> float:
    """Return the CPU-seconds of all ended children."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    raise SystemExit(main())
