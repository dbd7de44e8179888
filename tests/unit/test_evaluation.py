"""Evaluation measures what happened, loses nothing, resumes, and publishes no failure as a result."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from research_rl.config import Config
from research_rl.episode.agent import Completion, SearchFailure
from research_rl.episode.prompts import FolderTokenizer, encode_prompt
from research_rl.episode.trajectory import Passage
from research_rl.errors import DataError, ModelError, ServiceError
from research_rl.evaluation import evaluate as module
from research_rl.evaluation.evaluate import Player, evaluate
from research_rl.evaluation.methods import find
from research_rl.evaluation.results import HeldOutQuestion, Result, UnfinishedResults, read_questions, read_results, write_results
from research_rl.evaluation.summary import headline, summarise
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace
from research_rl.serving.serve import served_name
from tests.contract import chain_model
from tests.json_server import JsonHandler

EOS = "<eos>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    """A real tokenizer with one token a byte."""
    return FolderTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with one token a byte into a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


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


def questions(count: int) -> list[HeldOutQuestion]:
    return [
        HeldOutQuestion(
            n, f"q{n}", "even" if n % 2 == 0 else "odd", f"question number {n}.", ("Ada",) if n % 4 else ("Bob",), ("p1", "p2")[: 1 + n % 2]
        )
        for n in range(count)
    ]


def play(
    tokenizer: FolderTokenizer, engine: Engine, asked: Sequence[HeldOutQuestion], shelf: Shelf | None = None, config: Config = CONFIG
) -> list[Result]:
    player = Player(config, tokenizer, find("research"), config.evaluation.seed, lambda identifiers: [])
    return asyncio.run(evaluate(player, asked, engine, shelf or Shelf(), lambda result: None))


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


def test_the_reward_that_was_trained_is_measured_beside_the_published_ones(tokenizer: FolderTokenizer) -> None:
    terms = [{"kind": "f1", "weight": 1.0}, {"kind": "retrieval", "weight": 4.0}, {"kind": "length", "weight": -0.5}]
    config = Config.model_validate({**CONFIG.model_dump(mode="json"), "reward": {"rule": "composed", "terms": terms}})
    results = play(tokenizer, Engine(tokenizer), questions(8), config=config)
    assert results[1].reward_parts == {"f1": 1.0, "retrieval": 2.0, "length": -0.5}
    assert (results[1].reward, results[1].reward_repository) == (2.5, 1.0)
    metrics = summarise(results, 200, 1)
    assert metrics["reward"]["mean"] == headline(metrics)["reward"] == pytest.approx(sum(r.reward for r in results) / 8)
    assert metrics["reward"]["mean"] > 1 >= metrics["reward_repository"]["mean"]


def test_the_judge_of_training_judges_an_evaluation_and_its_failures_are_counted(tokenizer: FolderTokenizer) -> None:
    reward = {"rule": "composed", "terms": [{"kind": "judge", "weight": 1.0}], "judge": {"model": "m", "fallback": "zero"}}
    tree = {**CONFIG.model_dump(mode="json"), "reward": reward, "judge": {"url": "http://127.0.0.1:9/v1", "attempts": 1}}
    results = play(tokenizer, Engine(tokenizer), questions(4), config=Config.model_validate(tree))
    assert [result.judge is None for result in results] == [False, True, True, True], "a gold answer needs no judge"
    metrics = summarise(results, 200, 1)
    assert metrics["judge_failed"] == {**metrics["judge_failed"], "mean": 1.0, "n": 1}
    assert metrics["reward"]["mean"] == 0.75
    assert "judge_failed" not in summarise(play(tokenizer, Engine(tokenizer), questions(4)), 200, 1)


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


class Talker(Engine):
    """Answers at once and goes on talking until its tokens are used up."""

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        ids = self.tokenizer.encode("<think>so</think><answer>\\boxed{Ada}</answer>" + " and" * 2000)[:max_tokens]
        return Completion(tuple(ids), (0.0,) * len(ids), "length")


def test_published_limits_count_as_the_published_evaluation(tokenizer: FolderTokenizer) -> None:
    """There an answer before the cut counts for nothing, and the limit bounds prompt and response together."""
    default = Config.model_validate({**CONFIG.model_dump(), "episode": {"max_response_tokens": 4000}})
    published = Config.model_validate({**default.model_dump(), "evaluation": {"concurrency": 4, "published_limits": True}})
    asked = questions(2)[1:]
    (loose,) = play(tokenizer, Talker(tokenizer), asked, config=default)
    assert (loose.prediction, loose.em, loose.stop, loose.response_tokens) == ("Ada", 1.0, "token_limit", 4000)
    (strict,) = play(tokenizer, Talker(tokenizer), asked, config=published)
    assert (strict.prediction, strict.em, strict.f1, strict.stop) == ("", 0.0, 0.0, "token_limit")
    assert strict.response_tokens == 4000 - len(encode_prompt(tokenizer, asked[0].question, published.prompt))
    assert strict.reward_paper == loose.reward_paper
    (whole,) = play(tokenizer, Engine(tokenizer), asked, config=published)
    assert (whole.prediction, whole.em, whole.stop) == ("Ada", 1.0, "answered")


def test_a_prompt_that_is_too_long_costs_its_own_question_alone(tokenizer: FolderTokenizer) -> None:
    long = HeldOutQuestion(0, "long", "even", "x" * 5000, ("Ada",), ())
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
    assert metrics["by_data_source"]["odd"]["f1"] == {"mean": 1.0, "low": 0.630583, "high": 1.0, "n": 8}
    assert {hops: group["recall"]["mean"] for hops, group in metrics["by_hops"].items()} == {"1": 1.0, "2": 0.5}
    assert sum(share["mean"] for share in metrics["stop"].values()) == pytest.approx(1.0)
    assert headline(metrics) == {"n": 16, "em": 0.75, "f1": 0.75, "format": 1.0, "searches": 1.0, "recall": 0.75, "reward": 0.775}


def test_recall_is_left_out_where_no_supporting_passage_is_known(tokenizer: FolderTokenizer) -> None:
    asked = [HeldOutQuestion(0, "q", "s", "question", ("Ada",), ())]
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
    assert read_questions(tmp_path / "test.parquet", None, 2) == questions(4), "two of each set, which lie in turn"
    assert [question.row for question in read_questions(tmp_path / "test.parquet", 3, 2)] == [0, 1, 2]
    prepared(tmp_path, 0)
    with pytest.raises(DataError, match="has no questions"):
        read_questions(tmp_path / "test.parquet", None)


class Services:
    """A model server and a retriever on loopback, over HTTP; the model refuses prompts that hold `broken` as often as `failures` says."""

    def __init__(self, tokenizer: FolderTokenizer, model: str) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.offered: dict[str, object] = {}
        self.broken, self.failures = "\0", 0
        self.index, self.replaced_at = "", -1
        self.manifests: dict[str, str] = {}
        self.asked: list[int] = []
        services = self

        class Handler(JsonHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(
                    200,
                    {"data": [{"id": services.model, **services.offered}], "manifests": {"index": services.index, **services.manifests}},
                )

            def do_POST(self) -> None:
                body = self.body()
                if self.path == "/v1/completions":
                    self.reply(*services.complete(services.tokenizer.decode(body["prompt"])))
                else:
                    hits = [[{"id": "p1", "contents": "Ada wrote it"}] for _ in body["query"]]
                    self.reply(200, [hits, [[1.0]] * len(hits)] if body.get("return_score") else hits)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def complete(self, prompt: str) -> tuple[int, object]:
        """Return status and body: first a search, after its result an answer."""
        searched = prompt.endswith("</result>")
        if not searched:
            self.asked.append(int(re.findall(r"question number (\d+)\.", prompt)[-1]))
            if self.asked[-1] == self.replaced_at:
                self.index = "another"
        if self.broken in prompt and self.failures > 0:
            self.failures -= 1
            return 400, {"detail": "the engine is gone"}
        text = "<think>so</think><answer>\\boxed{Ada}</answer>" + EOS if searched else "<think>hm</think><search>who</search>"
        ids = self.tokenizer.encode(text)
        stop = None if searched else "</search>"
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [0.0] * len(ids)}, "finish_reason": "stop", "stop_reason": stop}
        return 200, {"choices": [choice]}


class Stage:
    """The stage `baseline` in a workspace, played against services that are already running."""

    def __init__(self, root: Path, services: Services, count: int) -> None:
        self.workspace, self.services = Workspace(root), services
        prepared(self.workspace.folder("prepare"), count)

    def run(self, **evaluation: object) -> list[int]:
        """Run the stage and return the rows of the questions that the model was asked, in order."""
        tree = CONFIG.model_dump(mode="json")
        tree["evaluation"] |= evaluation
        tree["serving"]["url"] = tree["retriever"]["url"] = self.services.url
        parents = {
            name: Manifest(stage=name, config_hash="", parents={}, code_version="", counts={}, facts={}, files=()) for name in PARENTS
        }
        self.services.asked.clear()
        module.run_baseline(Context(STAGES["baseline"], Config.model_validate(tree), self.workspace, parents, lambda text, share: None))
        return sorted(self.services.asked)

    @property
    def folder(self) -> Path:
        return self.workspace.folder("baseline")


def policy_folder(folder: Path, chain: dict[str, str] | None = None, **described: object) -> Path:
    """Make a policy folder that the real checks accept; `described` goes into its config.json."""
    chain_model.build(folder, chain or {}, tuple(f"w{n}" for n in range(300)))
    save_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192, **described}))
    return folder


@contextmanager
def serving(services: Services) -> Iterator[None]:
    """Answer requests, in a thread of this process."""
    thread = Thread(target=services.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield
    services.server.shutdown()
    services.server.server_close()
    thread.join()


@pytest.fixture
def stage(tmp_path: Path, tokenizer: FolderTokenizer) -> Iterator[Stage]:
    """The stage with ten questions."""
    services = Services(tokenizer, served_name(policy_folder(tmp_path / "artifacts/policy")))
    with serving(services):
        yield Stage(tmp_path, services, 10)


PARENTS = STAGES["baseline"].parents


def test_a_model_that_the_prompt_cannot_be_put_to_is_refused_before_it_is_asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = CONFIG.prompt.model_copy(update={"template": "instruct"})
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", CONFIG.model_copy(update={"prompt": prompt}))
    with pytest.raises(ModelError, match=r"cannot be evaluated: prompt\.template=instruct, and the model has no chat template"):
        stage.run()
    assert stage.services.asked == [] and not stage.folder.exists()


def test_a_question_that_was_lost_is_played_once_more(stage: Stage) -> None:
    stage.services.broken, stage.services.failures = "number 7.", 1
    assert stage.run() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]
    published = manifest.load(stage.folder)
    assert published.counts == {"questions": 10, "lost": 0}
    assert published.facts["f1"] == pytest.approx(0.7)


def test_few_questions_that_stay_lost_are_published_as_lost(stage: Stage) -> None:
    stage.services.broken, stage.services.failures = "number 7.", 10**9
    assert stage.run(max_failures=0.1).count(7) == 2
    assert manifest.load(stage.folder).counts == {"questions": 10, "lost": 1}
    results = read_results(stage.folder)
    assert [result.row for result in results] == list(range(10))
    assert [(result.row, result.stop) for result in results if result.lost] == [(7, "engine_failure")]


def test_failures_past_the_limit_publish_nothing_and_the_next_run_asks_only_what_is_missing(stage: Stage) -> None:
    stage.services.broken, stage.services.failures = "number 7.", 2
    with pytest.raises(
        ServiceError, match=r"(?s)1 of 10 questions were lost .* evaluation.max_failures=0.02; the first: .*the engine is gone"
    ):
        stage.run()
    assert not stage.folder.exists()
    assert stage.run() == [7]
    assert manifest.load(stage.folder).counts == {"questions": 10, "lost": 0}
    assert not list((stage.workspace.root / "artifacts" / ".work").glob("baseline*"))


def test_unfinished_work_of_other_parameters_is_not_reused(stage: Stage) -> None:
    stage.services.broken, stage.services.failures = "number 3.", 2
    with pytest.raises(ServiceError):
        stage.run()
    assert stage.run(seed=CONFIG.evaluation.seed + 1) == list(range(10))


def test_the_parameters_of_an_evaluation_are_those_that_decided_it(stage: Stage) -> None:
    stage.run()
    parameters = json.loads((stage.folder / "parameters.json").read_text())
    assert {"episode", "evaluation.rows", "evaluation.seed", "policy", "prompt", "data"} <= set(parameters)
    assert not {"evaluation", "evaluation.concurrency", "evaluation.max_failures"} & set(parameters), "they decide nothing"
    assert not {"train", "retriever", "serving", "tracking"} & set(parameters)
    assert json.loads((stage.folder / "metrics.json").read_text())["n"] == 10


@pytest.fixture
def index(stage: Stage) -> str:
    """The hash of an index in the workspace, which the retriever serves."""
    with manifest.publish(stage.workspace.folder("index"), "index", "", {}, {}) as staging:
        (staging.path / "faiss.index").write_bytes(b"vectors")
    stage.services.index = manifest.load(stage.workspace.folder("index")).hash
    return stage.services.index


def test_answers_of_a_retriever_that_was_replaced_meanwhile_are_dropped(stage: Stage, index: str) -> None:
    stage.services.replaced_at = 7
    with pytest.raises(ServiceError, match=r"serves index another, but .* answers were dropped"):
        stage.run()
    assert not stage.folder.exists()
    stage.services.replaced_at, stage.services.index = -1, index
    assert stage.run() == list(range(10))
    assert manifest.load(stage.folder).counts == {"questions": 10, "lost": 0}


def test_an_evaluation_killed_before_its_index_was_compared_is_compared_by_the_next(
    stage: Stage, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_require_same_index", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.run()
    stage.services.index = "another"
    with pytest.raises(ServiceError, match="serves index another"):
        stage.run()
    assert not stage.folder.exists()
    stage.services.index = index
    assert stage.run() == []
    assert manifest.load(stage.folder).counts == {"questions": 10, "lost": 0}
