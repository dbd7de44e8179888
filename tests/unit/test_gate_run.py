"""A gate asks no more than it needs, nothing twice, and loses nothing when it is killed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.evaluation import cells, gate_run
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.gate import Decision, Outcome
from research_rl.evaluation.results import read_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from research_rl.report.gate import describe
from research_rl.serving.model import served_name
from tests.results import lost, played
from tests.unit.test_evaluation import CONFIG, EOS, Services, policy_folder, serving, tokenizer

__all__ = ["tokenizer"]

COUNT = 120


class Policies(Services):
    """A server of several models: each answers right the share of questions that `skill` gives; `asked_of` counts questions by model."""

    def __init__(self, tokenizer: Any, skill: dict[str, float]) -> None:
        super().__init__(tokenizer, "")
        self.skill = skill
        self.asked_of: dict[str, Counter[int]] = {name: Counter() for name in skill}
        self.manifests: dict[str, str] = {}
        self.refused_after = 10**9
        policies = self

        class Handler(self.server.RequestHandlerClass):  # type: ignore[name-defined, misc]
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": name} for name in policies.skill], "manifests": policies.manifests})

            def do_POST(self) -> None:
                if self.path != "/v1/completions":
                    return super().do_POST()
                body = self.body()
                self.reply(*policies.said(body["model"], policies.tokenizer.decode(body["prompt"])))

        self.server.RequestHandlerClass = Handler

    def said(self, model: str, prompt: str) -> tuple[int, object]:
        """Return status and body: an answer without a search."""
        number = int(re.findall(r"question number (\d+)\.", prompt)[-1])
        if sum(map(sum, (found.values() for found in self.asked_of.values()))) >= self.refused_after:
            return 400, {"detail": "the engine is gone"}
        self.asked_of[model][number] += 1
        # Spread over the questions, so that every beginning of a random order holds about the same share.
        right = (number * 37 % 100) < 100 * self.skill[model]
        ids = self.tokenizer.encode(f"<think>so</think><answer>\\boxed{{{'Ada' if right else 'Eve'}}}</answer>{EOS}")
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [0.0] * len(ids)}, "finish_reason": "stop", "stop_reason": None}
        return 200, {"choices": [choice]}

    def total(self, model: str) -> int:
        """Return how many requests asked a model a question."""
        return sum(self.asked_of[model].values())


class Ring:
    """A workspace of `COUNT` questions in two sets with the policies good, fair and bad."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.workspace = Workspace(root)
        for name in cells.PARENTS:
            with manifest.publish(self.workspace.folder(name), name, "x", {}) as staging:
                if name == "prepare":
                    questions(staging.path)
        folders = {name: policy(root / name, name) for name in ("good", "fair", "bad")}
        self.names = {name: served_name(folder) for name, folder in folders.items()}
        skill = {"good": 0.9, "fair": 0.4, "bad": 0.1}
        self.services = Policies(tokenizer, {self.names[name]: share for name, share in skill.items()})
        self.services.manifests = {name: manifest.load(self.workspace.folder(name)).hash for name in ("corpus", "index")}

    def config(self, **rules: object) -> Config:
        tree = CONFIG.model_dump(mode="json")
        tree["gate"] |= {"min_questions": 20, "batch": 16} | rules
        tree["serving"]["url"] = tree["retriever"]["url"] = self.services.url
        return Config.model_validate(tree)

    def gate(self, challenger: str, champion: str, sets: tuple[str, ...] = (), **rules: object) -> gate_run.Gate:
        config = self.config(**rules)
        models = [cells.model(str(self.workspace.root / name), config, self.workspace) for name in (challenger, champion)]
        return gate_run.prepare(config, self.workspace, *models, sets)

    def meet(self, challenger: str, champion: str, sets: tuple[str, ...] = (), **rules: object) -> Decision:
        return gate_run.meet(self.gate(challenger, champion, sets, **rules), silent)

    def asked(self, name: str) -> int:
        return self.services.total(self.names[name])


def questions(
    folder: Path, text: str = "question number {n}.", sources: tuple[str, ...] = ("even", "odd"), few: int = COUNT, count: int = COUNT
) -> None:
    """Write prepared questions of these sources in turn, of the last source at most `few`."""
    rows = [
        {
            "data_source": "even" if n % 2 == 0 else "odd",
            "extra_info": {
                "id": f"q{n}",
                "question": text.format(n=n),
                "golden_answers": ["Ada"],
                "supporting_passage_ids": ["p1"],
            },
        }
        for n in range(count)
        if ("even" if n % 2 == 0 else "odd") in sources and (n % 2 == 0 or n < 2 * few)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")


def policy(folder: Path, name: str) -> Path:
    return policy_folder(folder, {name: name}, named=name)


@pytest.fixture
def ring(tmp_path: Path, tokenizer: object) -> Iterator[Ring]:
    found = Ring(tmp_path, tokenizer)
    with serving(found.services):
        yield found


def test_a_better_challenger_is_promoted_after_a_part_of_the_questions(ring: Ring) -> None:
    decision = ring.meet("good", "bad")
    assert decision.outcome is Outcome.PROMOTE
    assert 20 <= ring.asked("good") == ring.asked("bad") < COUNT, "both are asked the same questions, and no batch after the decision"
    gate = ring.gate("good", "bad")
    written = json.loads((gate.folder / gate_run.DECISION).read_text())
    assert written["outcome"] == "promote" and written["asked"] == ring.asked("good")
    sides = [read_results(gate.folder / name) for name in ("challenger", "champion")]
    assert [result.row for result in sides[0]] == [result.row for result in sides[1]] and len(sides[0]) == written["asked"]
    assert manifest.load(gate.folder).facts["outcome"] == "promote"
    said = describe(gate, decision)
    assert said.startswith("# good against bad: promote") and decision.reason in said


def test_a_worse_challenger_is_refused_and_the_champion_asked_nothing_again(ring: Ring) -> None:
    ring.meet("good", "fair")
    before = ring.asked("good")
    assert ring.meet("bad", "good").outcome is Outcome.REFUSE
    assert max(ring.services.asked_of[ring.names["good"]].values()) == 1, "a champion answers a question once, whoever challenges it"
    assert ring.asked("good") <= max(before, ring.asked("bad"))


def test_an_equal_gate_stands_and_asks_nothing(ring: Ring) -> None:
    first = ring.meet("good", "bad")
    asked = ring.asked("good") + ring.asked("bad")
    assert ring.meet("good", "bad") == first
    assert ring.meet("good", "bad", together=False) == first, "how the models are served decides nothing"
    assert ring.asked("good") + ring.asked("bad") == asked


def test_other_rules_are_another_gate_over_the_same_answers(ring: Ring) -> None:
    assert ring.meet("good", "bad").outcome is Outcome.PROMOTE
    asked = ring.asked("good")
    assert ring.meet("good", "bad", min_questions=80).outcome is Outcome.PROMOTE
    assert ring.asked("good") > asked and max(ring.services.asked_of[ring.names["good"]].values()) == 1
    assert len(list((ring.workspace.root / "artifacts" / "gates").iterdir())) == 2


def test_what_was_answered_before_does_not_change_a_decision(ring: Ring) -> None:
    ring.meet("good", "bad", min_questions=100)
    late = ring.meet("good", "bad")
    assert late.evidence["n"] < 100, "the decision is that of the look after which it fell"


def test_a_gate_that_lost_its_services_goes_on_where_it_stopped(ring: Ring) -> None:
    ring.services.refused_after = 21
    with pytest.raises(ServiceError, match="the engine is gone"):
        ring.meet("good", "bad")
    assert not (ring.workspace.root / "artifacts" / "gates").exists()
    kept = ring.asked("good") + ring.asked("bad")
    assert kept == 21
    ring.services.refused_after = 10**9
    assert ring.meet("good", "bad").outcome is Outcome.PROMOTE
    most = [max(ring.services.asked_of[ring.names[name]].values()) for name in ("good", "bad")]
    assert most == [1, 1], "what was answered before the outage is not asked again"


def test_models_that_do_not_fit_together_are_served_in_turn(ring: Ring) -> None:
    assert ring.meet("good", "bad", together=False).outcome is Outcome.PROMOTE
    assert ring.asked("bad") == COUNT and ring.asked("good") < COUNT


def test_a_gate_of_chosen_sets_asks_only_these(ring: Ring) -> None:
    ring.meet("good", "bad", ("odd",))
    assert all(number % 2 for number in ring.services.asked_of[ring.names["good"]])
    with pytest.raises(ConfigError, match="which are even, odd"):
        ring.gate("good", "bad", ("nq",))


def test_a_set_that_must_hold_and_is_not_asked_is_refused_by_name(ring: Ring) -> None:
    with pytest.raises(
        ConfigError, match=r"gate\.must_hold names musiqe, and the questions are those of even, odd: .*correct gate\.must_hold"
    ):
        ring.gate("good", "bad", must_hold={"odd": 0.1, "musiqe": 0.05})
    with pytest.raises(ConfigError, match=r"gate\.must_hold names even, and the questions are those of odd:"):
        ring.gate("good", "bad", ("odd",), must_hold={"even": 0.1})


def test_what_a_published_evaluation_lost_is_asked_again_and_kept(ring: Ring) -> None:
    gate = ring.gate("good", "bad")
    for cell in gate.champion.cells:
        numbers = range(0 if cell.question_set == "even" else 1, COUNT, 2)
        results = [lost(n, cell.question_set) if n < 4 else played(n, "Bob", source=cell.question_set) for n in numbers]
        with manifest.publish(cell.folder, cells.STAGE, cell.hash, gate.built, cell.facts) as staging:
            write_evaluation(staging, gate.config, results, {})
    first = ring.meet("good", "bad", min_questions=COUNT)
    assert ring.services.asked_of[ring.names["bad"]] == Counter(range(4)), "only what was lost is asked"
    assert first.evidence["lost"] == 0
    ring.meet("good", "bad", min_questions=COUNT - 1)
    assert ring.asked("bad") == 4, "the answers are kept"


def test_a_model_does_not_meet_itself(ring: Ring) -> None:
    with pytest.raises(ConfigError, match="are one model"):
        ring.gate("good", "good")


def test_answers_on_another_index_are_not_reused(ring: Ring) -> None:
    ring.meet("good", "bad")
    asked = ring.asked("bad")
    folder = ring.workspace.folder("index")
    with manifest.publish(folder, "index", "y", {}) as staging:
        (staging.path / "faiss.index").write_bytes(b"other")
    ring.services.manifests["index"] = manifest.load(folder).hash
    ring.meet("good", "bad")
    assert ring.asked("bad") == 2 * asked
