"""Cells: each combination of model, method and question set is an artifact of its own, played once and resumed by question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from research_rl.config import Config, PromptConfig
from research_rl.errors import ConfigError, ModelError, ServiceError
from research_rl.evaluation import cells
from research_rl.evaluation.matrix import CellOutcome, Matrix, play
from research_rl.evaluation.results import RECORD, read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from research_rl.report.compare import compare
from research_rl.report.matrix import describe
from research_rl.serving.model import served_name
from tests.unit.test_evaluation import CONFIG, Services, policy_folder, prepared, serving, tokenizer

__all__ = ["tokenizer"]


class Bench:
    """A workspace of ten questions in two sets, an untrained policy, and services that are already running."""

    def __init__(self, root: Path, services: Services) -> None:
        self.workspace, self.services = Workspace(root), services
        for name in cells.PARENTS:
            with manifest.publish(self.workspace.folder(name), name, "x", {}) as staging:
                if name == "prepare":
                    prepared(staging.path, 10)
        services.manifests = {name: manifest.load(self.workspace.folder(name)).hash for name in ("corpus", "index")}

    def config(self, **evaluation: object) -> Config:
        tree = CONFIG.model_dump(mode="json")
        tree["evaluation"] |= evaluation
        tree["serving"]["url"] = tree["retriever"]["url"] = self.services.url
        return Config.model_validate(tree)

    def model(self, choice: str = "before") -> cells.Model:
        return cells.model(choice, self.config(), self.workspace)

    def play(self, *methods: str, sets: tuple[str, ...] = (), **evaluation: object) -> list[CellOutcome]:
        """Play the policy and note which questions the model was asked."""
        self.services.asked.clear()
        return play(self.config(**evaluation), self.workspace, Matrix([self.model()], methods, sets), silent)


@pytest.fixture
def bench(tmp_path: Path, tokenizer: object) -> Iterator[Bench]:
    folder = policy_folder(tmp_path / "made")
    workspace = Workspace(tmp_path)
    with manifest.publish(workspace.folder("policy"), "policy", "x", {}) as staging:
        for path in folder.iterdir():
            path.rename(staging.path / path.name)
    services = Services(tokenizer, served_name(workspace.folder("policy")))  # type: ignore[arg-type]
    with serving(services):
        yield Bench(tmp_path, services)


def test_a_matrix_leaves_one_artifact_a_cell_and_plays_none_twice(bench: Bench) -> None:
    first = bench.play("research", "closed-book")
    assert len({item.cell.folder for item in first}) == 4 and all(item.manifest for item in first)
    assert sorted(bench.services.asked) == sorted([*range(10), *range(10)])
    assert {item.cell.question_set: item.manifest.counts["questions"] for item in first if item.manifest} == {"even": 5, "odd": 5}
    again = bench.play("closed-book", "research", sets=("odd",))
    assert bench.services.asked == []
    assert {item.cell.hash for item in again} == {item.cell.hash for item in first if item.cell.question_set == "odd"}


def test_a_cell_that_failed_keeps_what_was_played_and_the_others_stand(bench: Bench) -> None:
    bench.services.broken, bench.services.failures = "number 7.", 2
    with pytest.raises(ServiceError, match=r"(?s)1 of 5 questions were lost"):
        bench.play("research")
    (standing,) = (bench.workspace.root / "artifacts" / "cells").iterdir()
    assert "even" in standing.name
    assert all(item.manifest for item in bench.play("research"))
    assert bench.services.asked == [7], "only what was lost is asked again"


def test_whatever_decides_a_cell_is_in_its_hash(bench: Bench) -> None:
    built, model = cells.parents(bench.workspace, bench.config()), bench.model()

    def hashes(config: Config, *, method: str = "research", samples: int = 1, model: cells.Model = model) -> set[str]:
        return {cell.hash for cell in cells.cells(config, bench.workspace, built, [model], [method], ["odd", "even"], samples)}

    drawn = bench.config(temperature=1.0)
    other = cells.Model("other", model.folder, "0" * 64)
    variants = [
        hashes(bench.config()),
        hashes(bench.config(seed=3)),
        hashes(bench.config(), method="closed-book"),
        hashes(bench.config(), model=other),
        hashes(drawn, samples=3),
    ]
    assert [len(found) for found in variants] == [2, 2, 2, 2, 6]
    assert len(set.union(*variants)) == 14
    assert hashes(drawn) < hashes(drawn, samples=3), "more samples are more cells, not other ones"
    assert hashes(bench.config()) == hashes(
        bench.config().model_copy(update={"retriever": bench.config().retriever.model_copy(update={"url": None})})
    )
    changed = {**built, "index": built["prepare"]}
    assert not hashes(bench.config()) & {
        cell.hash for cell in cells.cells(bench.config(), bench.workspace, changed, [model], ["research"], ["odd"], 1)
    }


def test_so_many_questions_of_each_set_are_asked(bench: Bench) -> None:
    first = bench.play("research", rows_per_set=2)
    assert sorted(bench.services.asked) == [0, 1, 2, 3]
    assert {item.cell.question_set: item.manifest.counts["questions"] for item in first if item.manifest} == {"even": 2, "odd": 2}
    bench.play("research", sets=("odd",), rows_per_set=3)
    assert sorted(bench.services.asked) == [1, 3, 5], "another number is another cell"


def test_a_torn_cell_is_played_again(bench: Bench) -> None:
    (outcome,) = bench.play("research", sets=("odd",))
    with (outcome.cell.folder / "results.jsonl").open("a") as stream:
        stream.write("torn")
    assert cells.standing(outcome.cell) is None
    (outcome,) = bench.play("research", sets=("odd",))
    assert len(bench.services.asked) == 5 and len(read_results(outcome.cell.folder)) == 5


def without_seconds(path: Path) -> None:
    """Make a file of results one of a version whose records had a field less."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({name: value for name, value in each.items() if name != "seconds"}) + "\n" for each in records))


def test_what_another_version_recorded_or_graded_is_played_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as another:
        another.setattr(cells, "RECORD", "of another version", raising=False)
        (old,) = bench.play("research", sets=("odd",))
    without_seconds(old.cell.folder / "results.jsonl")
    facts, results = old.cell.facts, (old.cell.folder / "results.jsonl").read_bytes()
    with manifest.publish(old.cell.folder, cells.STAGE, old.cell.hash, {}, facts) as staging:
        (staging.path / "results.jsonl").write_bytes(results)
    (new,) = bench.play("research", sets=("odd",))
    assert len(bench.services.asked) == 5 and "| before | research | odd | 5 |" in describe([new])
    assert manifest.found(old.cell.folder), "the cell of the other version stands beside it"
    assert manifest.load(new.cell.folder).facts["record"] == RECORD


def test_a_journal_of_another_version_costs_its_questions_alone(bench: Bench) -> None:
    bench.services.broken, bench.services.failures = "number 7.", 2
    with pytest.raises(ServiceError, match=r"(?s)1 of 5 questions were lost"):
        bench.play("research", sets=("odd",))
    (journal,) = bench.workspace.work("").glob("cell-*/results.jsonl")
    without_seconds(journal)
    assert all(item.manifest for item in bench.play("research", sets=("odd",)))
    assert sorted(bench.services.asked) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("order", [("before", "own"), ("own", "before")])
def test_a_model_under_two_names_is_played_once_and_shown_under_both(bench: Bench, order: tuple[str, str]) -> None:
    first = bench.model()
    models = {"before": first, "own": cells.Model("registry-name", first.folder, first.sha256)}
    matrix = Matrix([models[name] for name in order], ["research"], ("odd",))
    bench.services.asked.clear()
    both = play(bench.config(), bench.workspace, matrix, silent)
    assert sorted(bench.services.asked) == [1, 3, 5, 7, 9], "each question is asked once"
    table = describe(both)
    assert "| before | research | odd | 5 |" in table and "| registry-name | research | odd | 5 |" in table
    assert " against " not in table, "one model is not compared with itself"
    stamps = {path: path.stat().st_mtime_ns for path in (bench.workspace.root / "artifacts" / "cells").glob("*/manifest.json")}
    assert len(stamps) == 1
    for name in order:
        (again,) = play(bench.config(), bench.workspace, Matrix([models[name]], ["research"], ("odd",)), silent)
        assert again.manifest == both[0].manifest and again.cell.folder == both[0].cell.folder
    assert len(bench.services.asked) == 5 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_model_that_is_named_twice_is_one_row(bench: Bench) -> None:
    matrix = Matrix([bench.model(), bench.model()], ["research"], ("odd",))
    assert len(play(bench.config(), bench.workspace, matrix, silent)) == 1


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("after", "--model after is the artifact of stage export, and .* has no manifest.json"),
        ("nowhere", "--model nowhere is neither before nor after"),
    ],
)
def test_an_unknown_model_is_named(bench: Bench, choice: str, said: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        bench.model(choice)


def test_the_model_of_a_running_server_is_played_as_its_folder_would_be(bench: Bench) -> None:
    folder, server = bench.workspace.folder("policy"), bench.services
    server.offered = {"root": str(folder), "max_model_len": 8192}
    offered = bench.model(f"{server.url}/v1")
    assert offered.sha256 == bench.model().sha256, "the server reads the very files of that artifact"
    (outcome,) = play(bench.config(), bench.workspace, Matrix([offered], ["research"], ("odd",)), silent)
    assert outcome.manifest and len(server.asked) == 5
    server.offered = {"root": "someone/model", "max_model_len": 8192}
    with pytest.raises(ServiceError, match="no longer serves"):
        play(bench.config(), bench.workspace, Matrix([offered], ["research"], ("even",)), silent)


def test_a_server_whose_files_lie_elsewhere_needs_a_tokenizer_and_counts_by_its_names(bench: Bench) -> None:
    folder, server = bench.workspace.folder("policy"), bench.services
    server.offered = {"root": "someone/model", "owned_by": "sglang"}
    with pytest.raises(ConfigError, match=r"from someone/model, which is no folder here; name .* --model http://127.*#FOLDER"):
        bench.model(server.url)
    first = bench.model(f"{server.url}#{folder}")
    assert first.sha256 != bench.model().sha256 and first.config(bench.config(), bench.workspace).serving.engine == "sglang"
    server.offered["root"] = "someone/other"
    assert bench.model(f"{server.url}#{folder}").sha256 != first.sha256


def test_a_server_that_reads_too_little_or_is_named_with_a_password_is_refused(bench: Bench) -> None:
    bench.services.offered = {"root": str(bench.workspace.folder("policy")), "max_model_len": 16}
    with pytest.raises(ModelError, match="reads 16 tokens, an episode may have"):
        play(bench.config(), bench.workspace, Matrix([bench.model(bench.services.url)], ["research"]), silent)
    with pytest.raises(ConfigError, match="RESEARCH_SERVING_TOKEN"):
        bench.model(bench.services.url.replace("http://", "http://me:secret@"))
    with pytest.raises(ServiceError, match="does not answer /v1/models"):
        bench.model("http://127.0.0.1:9")


def test_an_instruct_prompt_for_a_model_without_a_chat_template_is_refused_in_its_row_alone(bench: Bench) -> None:
    plain = bench.model()
    chat = replace(plain, prompt=PromptConfig(template="instruct"))
    bench.services.asked.clear()
    outcomes = play(bench.config(), bench.workspace, Matrix([chat, plain], ["research"], ("odd",)), silent)
    assert sorted(bench.services.asked) == [1, 3, 5, 7, 9], "the other model is played all the same"
    assert [bool(item.manifest) for item in outcomes] == [False, True]
    refused = "refused: prompt.template=instruct, and the model has no chat template; set prompt.template=base"
    assert f"| before (prompt instruct) | research | odd | {refused} |" in describe(outcomes)


def test_unknown_sets_methods_and_equal_samples_are_refused_before_anything_starts(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="--set musique is not among the workspace's test questions, which are even, odd"):
        bench.play("research", sets=("musique",))
    with pytest.raises(ConfigError, match="guess"):
        bench.play("guess")
    with pytest.raises(ConfigError, match=r"set evaluation\.temperature above 0"):
        play(bench.config(), bench.workspace, Matrix([bench.model()], ["research"], (), 2), silent)
    assert bench.services.asked == [] and not (bench.workspace.root / "artifacts" / "cells").exists()


def test_a_folder_of_ones_own_counts_by_its_content(bench: Bench, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    first = bench.model(str(own))
    (own / "config.json").write_text('{"a": 1}')
    assert bench.model(str(own)).sha256 != first.sha256 and first.name == "own"


def test_the_table_names_every_cell_and_pairs_what_belongs_together(bench: Bench) -> None:
    outcomes = bench.play("research", "closed-book", sets=("odd",))
    table = describe(outcomes)
    assert "| before | research | odd | 5 | 0 |" in table
    assert "what search adds, before" in table
    said = compare(outcomes[1].cell.folder, outcomes[0].cell.folder)
    assert "cell.method" in said, "what differs between two cells is said"
