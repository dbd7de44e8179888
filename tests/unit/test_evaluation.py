"""Evaluation measures what happened, loses nothing, resumes, and publishes no failure as a result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from research_rl.config import Config
from research_rl.episode.agent import Completion, SearchFailure
from research_rl.episode.prompts import FolderTokenizer
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError, ServiceError
from research_rl.evaluation import evaluate as module
from research_rl.evaluation.evaluate import evaluate
from research_rl.evaluation.results import Question, Result, UnfinishedResults, read_questions, read_results, write_results
from research_rl.evaluation.summary import headline, summarise
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace

EOS = "<eos>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    """A real tokenizer with one token a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return FolderTokenizer(folder)


class Engine:
    """Searches once and answers "Ada", or fails on prompts that hold `broken`; counts what runs at once."""

    def __init__(self, tokenizer: FolderTokenizer, broken: str = "\0", failures: int = 10**9) -> None:
        self.tokenizer, self.broken, self.failures = tokenizer, broken, failures
        self.calls = self.running = self.most = 0

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        self.calls, self.running = self.calls + 1, self.running + 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        text = self.tokenizer.decode(prompt_ids)
        if self.broken in text and self.failures > 0:
            self.failures -= 1
            raise ServiceError("the engine is gone")
        if text.endswith("</result>"):
            ids = self.tokenizer.encode("<think>so</think><answer>\\boxed{Ada}</answer>" + EOS)
            return Completion(tuple(ids), (0.0,) * len(ids), "eos")
        ids = self.tokenizer.encode("<think>hm</think><search>who</search>")
        return Completion(tuple(ids), (0.0,) * len(ids), "stop")


class Shelf:
    """Finds passage p1, or fails as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        self.failures -= 1
        return SearchFailure("HTTP 503") if self.failures >= 0 else [[Passage("p1", "Ada wrote it")] for _ in queries]


CONFIG = Config.model_validate({"prompt": {"max_tokens": 4096}, "episode": {"max_response_tokens": 400}, "evaluation": {"concurrency": 4}})


def questions(count: int) -> list[Question]:
    return [
        Question(
            n, f"q{n}", "even" if n % 2 == 0 else "odd", f"question number {n}.", ("Ada",) if n % 4 else ("Bob",), ("p1", "p2")[: 1 + n % 2]
        )
        for n in range(count)
    ]


def play(
    tokenizer: FolderTokenizer, engine: Engine, asked: Sequence[Question], shelf: Shelf | None = None, config: Config = CONFIG
) -> list[Result]:
    return asyncio.run(evaluate(config, asked, engine, shelf or Shelf(), tokenizer, lambda result: None))


def same(result: Result) -> str:
    """What a result is in a file."""
    return json.dumps(result.to_json(), sort_keys=True)


def test_every_number_of_a_question(tokenizer: FolderTokenizer) -> None:
    result = play(tokenizer, Engine(tokenizer), questions(2))[1]
    assert (result.em, result.f1, result.format, result.fault) == (1.0, 1.0, True, "ok")
    assert (result.reward_paper, result.reward_repository) == (1.0, 1.0)
    assert (result.searches, result.failed_searches, result.recall, result.hops) == (1, 0, 0.5, 2)
    assert (result.stop, result.prediction, result.lost) == ("answered", "Ada", False)
    written = "<think>hm</think><search>who</search><think>so</think><answer>\\boxed{Ada}</answer>"
    assert result.tokens == len(written) + 1
    assert result.response_tokens == result.tokens + len(" <result>\nAda wrote it\n</result>")
    assert [segment["author"] for segment in result.trajectory["segments"]] == ["model", "search", "model"]


def test_concurrency_is_bounded_and_the_order_kept(tokenizer: FolderTokenizer) -> None:
    engine = Engine(tokenizer)
    results = play(tokenizer, engine, questions(20))
    assert [result.row for result in results] == list(range(20))
    assert engine.most == 4


def test_a_lost_episode_costs_its_own_question_alone_and_stays_in_the_denominator(tokenizer: FolderTokenizer) -> None:
    results = play(tokenizer, Engine(tokenizer, broken="number 5."), questions(8))
    assert [result.row for result in results if result.lost] == [5]
    assert results[5].stop == "engine_failure" and "the engine is gone" in results[5].trajectory["error"]
    metrics = summarise(results, 200, 1)
    assert metrics["n"] == metrics["f1"]["n"] == 8
    assert metrics["f1"]["mean"] == pytest.approx(5 / 8)
    assert metrics["stop"]["engine_failure"]["mean"] == pytest.approx(1 / 8)


def test_a_prompt_that_is_too_long_costs_its_own_question_alone(tokenizer: FolderTokenizer) -> None:
    long = Question(0, "long", "even", "x" * 5000, ("Ada",), ())
    results = play(tokenizer, Engine(tokenizer), [long, questions(2)[1]])
    assert [result.stop for result in results] == ["engine_failure", "answered"]
    assert "prompt.max_tokens" in results[0].trajectory["error"]


def test_a_search_that_failed_is_told_apart_from_one_that_found_nothing(tokenizer: FolderTokenizer) -> None:
    results = play(tokenizer, Engine(tokenizer), questions(4)[1:3], Shelf(failures=1))
    assert sorted(result.failed_searches for result in results) == [0, 1]
    assert sum(result.lost for result in results) == 1


def test_metrics_have_intervals_by_source_and_by_hops(tokenizer: FolderTokenizer) -> None:
    metrics = summarise(play(tokenizer, Engine(tokenizer), questions(16)), 500, 1)
    assert metrics["f1"]["low"] <= metrics["f1"]["mean"] == 0.75 <= metrics["f1"]["high"]
    assert metrics["by_data_source"]["odd"]["f1"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 8}
    assert {hops: group["recall"]["mean"] for hops, group in metrics["by_hops"].items()} == {"1": 1.0, "2": 0.5}
    assert sum(share["mean"] for share in metrics["stop"].values()) == pytest.approx(1.0)
    assert headline(metrics) == {"n": 16, "em": 0.75, "f1": 0.75, "format": 1.0, "searches": 1.0, "recall": 0.75}


def test_recall_is_left_out_where_no_supporting_passage_is_known(tokenizer: FolderTokenizer) -> None:
    asked = [Question(0, "q", "s", "question", ("Ada",), ())]
    assert "recall" not in summarise(play(tokenizer, Engine(tokenizer), asked), 200, 1)


def test_the_journal_forgets_only_a_torn_last_line(tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    results = play(tokenizer, Engine(tokenizer), questions(3))
    journal = UnfinishedResults(tmp_path / "w" / "results.jsonl")
    for result in results:
        journal.add(result)
    path = tmp_path / "w" / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    again = UnfinishedResults(path)
    assert sorted(again.results) == [0, 1]
    again.add(results[2])
    assert [same(UnfinishedResults(path).results[row]) for row in range(3)] == [same(result) for result in results]


def test_results_survive_the_file(tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    results = play(tokenizer, Engine(tokenizer), questions(3))
    write_results(tmp_path, results)
    assert [same(result) for result in read_results(tmp_path)] == [same(result) for result in results]
    with pytest.raises(DataError, match="evaluate again"):
        Result.from_json({"row": 1})


def prepared(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "data_source": q.data_source,
            "extra_info": {
                "id": q.id,
                "question": q.question,
                "golden_answers": list(q.golden_answers),
                "supporting_passage_ids": list(q.supporting),
            },
        }
        for q in questions(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({"data_source": [], "extra_info": []}), folder / "test.parquet")


def test_questions_are_read_from_the_prepared_file(tmp_path: Path) -> None:
    prepared(tmp_path, 6)
    assert read_questions(tmp_path / "test.parquet", None) == questions(6)
    assert read_questions(tmp_path / "test.parquet", 2) == questions(2)
    prepared(tmp_path, 0)
    with pytest.raises(DataError, match="has no questions"):
        read_questions(tmp_path / "test.parquet", None)


class Stage:
    """The stage `baseline` in a workspace, with engine and searcher put in place of served ones."""

    def __init__(self, root: Path, tokenizer: FolderTokenizer, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.workspace = Workspace(root)
        prepared(self.workspace.folder("prepare"), count)
        self.asked: list[list[int]] = []
        self.engine, self.shelf = Engine(tokenizer), Shelf()
        monkeypatch.setattr(module, "_evaluate_served", self._served(tokenizer))

    def _served(self, tokenizer: FolderTokenizer) -> Callable[..., None]:
        def served(context: Context, model: Path, missing: list[Question], journal: UnfinishedResults, total: int) -> None:
            self.asked.append([question.row for question in missing])
            results = asyncio.run(evaluate(context.config, missing, self.engine, self.shelf, tokenizer, lambda r: r.lost or journal.add(r)))
            module._accept([result for result in results if result.lost], total, context.config.evaluation.max_failures)

        return served

    def run(self, config: Config = CONFIG) -> None:
        parents = {
            name: Manifest(stage=name, config_hash="", parents={}, code_version="", counts={}, facts={}, files=()) for name in PARENTS
        }
        module.run_baseline(Context(STAGES["baseline"], config, self.workspace, parents, lambda text, share: None))

    @property
    def folder(self) -> Path:
        return self.workspace.folder("baseline")


PARENTS = STAGES["baseline"].parents


def test_failures_past_the_limit_publish_nothing_and_the_next_run_asks_only_what_is_missing(
    tokenizer: FolderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, tokenizer, monkeypatch, 10)
    stage.engine = Engine(tokenizer, broken="number 7.", failures=1)
    with pytest.raises(ServiceError, match=r"1 of 10 questions were lost .* evaluation.max_failures=0.02; the first: .*the engine is gone"):
        stage.run()
    assert not stage.folder.exists()
    stage.run()
    assert stage.asked == [list(range(10)), [7]]
    found = manifest.load(stage.folder)
    assert found.counts == {"questions": 10, "lost": 0}
    assert found.facts["f1"] == pytest.approx(0.7)
    assert not list((tmp_path / "artifacts" / ".work").glob("baseline*"))


def test_unfinished_work_of_other_parameters_is_not_reused(
    tokenizer: FolderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, tokenizer, monkeypatch, 4)
    stage.engine = Engine(tokenizer, broken="number 3.")
    with pytest.raises(ServiceError):
        stage.run()
    stage.engine = Engine(tokenizer)
    stage.run(CONFIG.model_copy(update={"episode": CONFIG.episode.model_copy(update={"top_k": 1})}))
    assert stage.asked[1] == [0, 1, 2, 3]


def test_the_parameters_of_an_evaluation_are_those_that_decided_it(
    tokenizer: FolderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, tokenizer, monkeypatch, 2)
    stage.run()
    parameters = json.loads((stage.folder / "parameters.json").read_text())
    assert {"episode", "evaluation", "policy", "prompt", "data"} <= set(parameters)
    assert not {"train", "retriever", "serving", "tracking"} & set(parameters)
    assert json.loads((stage.folder / "metrics.json").read_text())["n"] == 2
