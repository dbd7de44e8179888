"""A real retriever records and is gone; the evaluation is replayed to equal trajectories. Changed evidence reaches the model's answers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research_rl.config import Config
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation import cells
from research_rl.evaluation.evidence import Evidence
from research_rl.evaluation.matrix import CellOutcome, Matrix, play
from research_rl.evaluation.results import Result, read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from research_rl.report.matrix import describe
from research_rl.serving.model import served_name
from tests.knowledge import TOWNS, built
from tests.unit.test_evaluation import CONFIG, EOS, Services, policy_folder, serving, tokenizer

__all__ = ["tokenizer"]

QUESTIONS, ROWS = 12, 60


class Reader(Services):
    """A model that searches for the person whom the question is about, and answers the town that a passage names, else "unknown"."""

    def complete(self, prompt: str) -> tuple[int, object]:
        number = int(re.findall(r"question number (\d+)\.", prompt)[-1])
        self.asked.append(number)
        searched = prompt.endswith("</result>")
        text = f"<think>hm</think><search>where does Person{number} Surname{number} live</search>"
        if searched:
            town = re.findall(rf"Surname{number} lives in (\w+)", prompt)
            text = f"<think>so</think><answer>\\boxed{{{town[-1] if town else 'unknown'}}}</answer>{EOS}"
        ids = self.tokenizer.encode(text)
        stop = None if searched else "</search>"
        return 200, {
            "choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [0.0] * len(ids)}, "finish_reason": "stop", "stop_reason": stop}]
        }


class Bench:
    """A workspace with a real index of vectors, and a model server that reads; the retriever is started by whoever needs it."""

    def __init__(self, root: Path, services: Services) -> None:
        self.workspace, self.services = built(root, ROWS, encoder={"dim": 256}), services

    def config(self, tape: str, rows: int = QUESTIONS) -> Config:
        tree = CONFIG.model_dump(mode="json")
        tree["serving"]["url"], tree["evaluation"]["rows"], tree["retriever"]["tape"] = self.services.url, rows, tape
        tree["episode"] |= {"max_response_tokens": 2000, "max_result_tokens": 1500}
        return Config.model_validate(tree)

    def play(self, tape: str = "off", rows: int = QUESTIONS, *evidence: Evidence) -> list[CellOutcome]:
        config = self.config(tape, rows)
        matrix = Matrix([cells.model("before", config, self.workspace)], ["research"], (), evidence=evidence)
        return play(config, self.workspace, matrix, silent)


@pytest.fixture
def bench(tmp_path: Path, tokenizer: object) -> Iterator[Bench]:
    workspace = Workspace(tmp_path)
    made = policy_folder(tmp_path / "made")
    with manifest.publish(workspace.folder("policy"), "policy", "x", {}) as staging:
        shutil.copytree(made, staging.path, dirs_exist_ok=True)
    with manifest.publish(workspace.folder("prepare"), "prepare", "x", {}) as staging:
        rows = [{"data_source": "towns", "extra_info": extra(n)} for n in range(ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), staging.path / "test.parquet")
    services = Reader(tokenizer, served_name(workspace.folder("policy")))  # type: ignore[arg-type]
    with serving(services):
        yield Bench(tmp_path, services)


def extra(n: int) -> dict[str, Any]:
    return {"id": f"q{n}", "question": f"question number {n}.", "golden_answers": [TOWNS[n % 5]], "supporting_passage_ids": [f"p{n}"]}


def without_times(result: Result) -> dict[str, Any]:
    """Return a result but for the seconds that it took."""
    record = result.to_json()
    trajectory = {name: value for name, value in record["trajectory"].items() if not name.endswith("seconds")}
    trajectory["searches"] = [{name: value for name, value in search.items() if name != "seconds"} for search in trajectory["searches"]]
    return {**record, "trajectory": trajectory, "seconds": 0}


def test_an_evaluation_is_replayed_without_its_index(bench: Bench) -> None:
    (recorded,) = bench.play("record")
    assert recorded.manifest and recorded.manifest.counts == {"questions": QUESTIONS, "lost": 0}
    before = [without_times(result) for result in read_results(recorded.cell.folder)]
    assert sum(result["em"] for result in before) == QUESTIONS
    (tape,) = (bench.workspace.root / "artifacts" / "tapes").iterdir()
    assert manifest.load(tape).counts["replies"] == QUESTIONS
    shutil.rmtree(recorded.cell.folder)
    for name in ("embed", "index"):
        shutil.rmtree(bench.workspace.folder(name))
    bench.services.asked.clear()
    (replayed,) = bench.play("replay")
    assert len(bench.services.asked) == 2 * QUESTIONS, "it is played anew"
    assert replayed.cell == recorded.cell, "the same index gives the same results, so it is the same cell"
    assert [without_times(result) for result in read_results(replayed.cell.folder)] == before
    with pytest.raises(DataError, match=r"3 searches are not on the tape .*Person1\d Surname1\d live' \(3 passages\).*tape=record"):
        bench.play("replay", QUESTIONS + 3)


def test_answers_fall_with_their_evidence(bench: Bench) -> None:
    changes = (Evidence("without", "supporting"), Evidence("swap", "bm25"), Evidence("noise", "1"))
    outcomes = bench.play("off", QUESTIONS, *changes)
    right = {item.cell.played: sum(result.em for result in read_results(item.cell.folder)) for item in outcomes}
    assert right == {
        "research": QUESTIONS,
        "research, without supporting": 0,
        "research, swapped for bm25": QUESTIONS,
        "research, noise 1": 0,
    }
    table = describe(outcomes)
    assert "| before | research, without supporting | towns | 12 | 0 | 0.000 (0.000 to 0.265) | -1.000 " in table
    assert "| before | research, swapped for bm25 | towns | 12 | 12 | 1.000 (0.735 to 1.000) | +0.000 " in table
    shown = {
        item.cell.played: [result.trajectory["searches"][0]["passage_ids"] for result in read_results(item.cell.folder)]
        for item in outcomes
    }
    assert shown["research, swapped for bm25"] != shown["research"], "words find other neighbours than vectors"
    assert all(len(ids) == 3 for ids in shown["research, without supporting"]), "replies are filled up again"
    bench.services.asked.clear()
    assert all(item.manifest for item in bench.play("off", QUESTIONS, *changes)) and not bench.services.asked


def test_a_swap_for_the_own_kind_is_refused(bench: Bench) -> None:
    found = manifest.read(bench.workspace.folder("index"))
    with manifest.publish(bench.workspace.folder("index"), "index", found.config_hash, {}) as staging:
        staging.facts |= {**found.facts, "kind": "bm25"}
    with pytest.raises(ConfigError, match="--swap bm25: the workspace's own index is of that kind"):
        bench.play("off", QUESTIONS, Evidence("swap", "bm25"))
