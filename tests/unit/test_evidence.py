"""Evidence is taken away, exchanged or spoiled as named, reproducibly, and the right answers that survive are counted in pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from research_rl.episode.agent import Searcher, SearchFailure
from research_rl.episode.prompts import FolderTokenizer
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ConfigError, DataError
from research_rl.evaluation import cells, crossings
from research_rl.evaluation.evidence import Evidence, chosen
from research_rl.evaluation.matrix import Matrix, play
from research_rl.evaluation.results import HeldOutQuestion, Result
from research_rl.evaluation.survival import survival
from research_rl.pipeline.stages import silent
from research_rl.report.compare import compare
from research_rl.report.matrix import describe
from tests.unit import test_evaluation
from tests.unit.test_cells import Bench, bench
from tests.unit.test_evaluation import Engine, Shelf, tokenizer

__all__ = ["bench", "tokenizer"]

CORPUS = [Passage(f"p{n}", f'"Title {n // 2}"\npassage {n} about Ada {n}', 1.0 - n / 100) for n in range(40)]
QUESTION = HeldOutQuestion(0, "q0", "set", "who was it?", ("Ada 3",), ("p4",))
WITHOUT, NOISE = Evidence("without", "supporting"), Evidence("noise", "0.5")


class Ranked:
    """Finds the first passages from the one on whose number ends the query, else from the first on; keeps what it was asked."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.asked = most, list[tuple[str, int]]()

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        self.asked += [(query, top_k) for query in queries]
        if top_k > self.most:
            return SearchFailure("retriever answered 422", SearchFault.REFUSED)
        starts = [int(last) if (last := query.split()[-1]).isdigit() else 0 for query in queries]
        return [CORPUS[start : start + top_k] for start in starts]


def passages(identifiers: Sequence[str]) -> list[Passage]:
    return [passage for passage in CORPUS if passage.id in identifiers]


def search(evidence: Evidence, searcher: Searcher, question: HeldOutQuestion = QUESTION, query: str = "q", seed: int = 1) -> list[str]:
    others = [HeldOutQuestion(n, f"q{n}", "set", f"other {n}", ("x",), ()) for n in range(20, 30)]
    changed = evidence.change([question, *others], passages, seed)(question, searcher)
    reply = asyncio.run(changed.search([query], 5))
    assert not isinstance(reply, SearchFailure)
    return [passage.id for passage in reply[0]]


def test_supporting_passages_and_those_of_their_titles_are_gone_as_if_never_indexed() -> None:
    index = Ranked()
    assert search(WITHOUT, index) == ["p0", "p1", "p2", "p3", "p6"], "p5 has the title of p4"
    assert index.asked == [("q", 5), ("q", 10)], "more is asked for only where something was taken away"
    assert search(WITHOUT, Ranked(), query="q 10") == ["p10", "p11", "p12", "p13", "p14"]
    assert search(WITHOUT, Ranked(most=5)) == ["p0", "p1", "p2", "p3"], "a service may allow no more passages"


def test_where_the_data_names_no_passages_those_with_an_answer_are_gone() -> None:
    unnamed = replace(QUESTION, supporting=())
    assert search(WITHOUT, Ranked(), unnamed) == ["p0", "p1", "p2", "p4", "p5"], "the words of p30 to p39 hold 3 within a number only"
    assert search(WITHOUT, Ranked(), replace(unnamed, golden_answers=("yes",))) == ["p0", "p1", "p2", "p3", "p4"]
    assert WITHOUT.refusal([replace(unnamed, golden_answers=("yes",))]) and not WITHOUT.refusal([unnamed])


def test_noise_takes_its_share_from_other_questions_and_is_the_same_each_time() -> None:
    plain = [f"p{n}" for n in range(5)]
    shares = {share: search(Evidence("noise", share), Ranked()) for share in ("0.2", "0.5", "1")}
    taken = {share: {place for place in range(5) if found[place] != plain[place]} for share, found in shares.items()}
    assert taken["0.2"] <= taken["0.5"] <= taken["1"] == set(range(5)), "a larger share takes the places of a smaller one, too"
    assert all(20 <= int(name[1:]) < 35 for name in shares["1"]) and len(set(shares["1"])) == 5
    assert search(NOISE, Ranked()) == shares["0.5"]
    many = [search(NOISE, Ranked(), query=f"{number} x") for number in range(400)]
    assert 900 < sum(name != own for found in many for name, own in zip(found, plain, strict=True)) < 1100, "half of 2,000 places"
    assert len({tuple(search(NOISE, Ranked(), seed=seed)) for seed in range(10)}) > 1
    assert NOISE.refusal([QUESTION]) and not NOISE.refusal([QUESTION, replace(QUESTION, question="another")])


def test_a_failed_search_stays_one() -> None:
    for evidence in (WITHOUT, Evidence("noise", "1")):
        changed = evidence.change([QUESTION, replace(QUESTION, question="another")], passages, 1)(QUESTION, Shelf(failures=1))
        assert asyncio.run(changed.search(["q"], 5)) == SearchFailure("HTTP 503")


def test_what_a_command_names() -> None:
    assert chosen("supporting", "bm25", "0.50,1") == (
        WITHOUT,
        Evidence("swap", "bm25"),
        NOISE,
        Evidence("noise", "1"),
    )
    assert chosen(None, None, None) == ()
    for wrong in ("0", "1.5", "half", "nan", "-1"):
        with pytest.raises(ConfigError, match=f"--noise {wrong} is no share"):
            chosen(None, None, wrong)


def results(tokenizer: FolderTokenizer, count: int) -> list[Result]:
    return test_evaluation.play(tokenizer, Engine(tokenizer), test_evaluation.questions(count))


def test_survival_counts_right_answers_in_pairs(tokenizer: FolderTokenizer) -> None:
    plain = results(tokenizer, 40)
    wrong = [replace(result, em=0.0, f1=0.0) if result.row < 20 else result for result in plain]
    found = survival(plain, wrong, WITHOUT, 500, 1)
    assert (found.right, found.survived, found.share, found.pairs, found.unknown) == (30, 15, 0.5, 40, 0)
    assert (round(found.low, 3), round(found.high, 3)) == (0.313, 0.687), "Clopper and Pearson's interval of 15 of 30"
    em = found.metrics["em"].difference
    assert em.mean == -15 / 40 and em.low <= em.mean <= em.high < 0 and found.exact_match.losses == 15
    lost = [replace(plain[1], failed_searches=1), *wrong[2:]]
    assert survival(plain, lost, WITHOUT, 500, 1).pairs == 38, "neither what is lost nor what is not there is counted"
    unknown = [replace(result, hops=0, golden_answers=("yes",)) if result.row % 2 else result for result in plain]
    without, noise = survival(unknown, wrong, WITHOUT, 500, 1), survival(unknown, wrong, NOISE, 500, 1)
    assert (without.pairs, without.unknown, noise.pairs, noise.unknown) == (20, 20, 40, 0)
    nothing = survival([replace(result, em=0.0) for result in plain], wrong, NOISE, 500, 1)
    assert (nothing.right, nothing.share) == (0, None)


def test_changed_cells_stand_beside_plain_ones_and_are_compared_with_them(bench: Bench) -> None:
    plain = bench.play("research")
    bench.services.asked.clear()
    matrix = Matrix([bench.model()], ["research", "closed-book"], ("odd", "even"), evidence=(NOISE, Evidence("noise", "1")))
    outcomes = play(bench.config(), bench.workspace, matrix, silent)
    assert {item.cell.hash for item in plain} < {item.cell.hash for item in outcomes}, "plain cells keep their hashes"
    assert len({item.cell.folder for item in outcomes}) == len(outcomes) == 12
    assert [item.refusal for item in outcomes if item.cell.evidence and item.cell.method == "closed-book"] == [
        "closed-book shows nothing that a search found, so there is no evidence to change"
    ] * 4
    table = describe(outcomes)
    assert "| before | research, noise 0.5 | odd | 5 | 5 | 1.000 (0.478 to 1.000) | +0.000 " in table
    changed = next(item.cell for item in outcomes if item.cell.evidence and item.manifest)
    assert "noise_0.5" in changed.folder.name and cells.standing(changed)
    said = compare(plain[1].cell.folder, changed.folder)
    assert "cell.evidence" in said
    with pytest.raises(DataError, match=r"was played noise 0\.5"):
        crossings.evaluated(changed.folder)
    assert sorted(bench.services.asked) == sorted([*range(10)] * 3), "plain cells are not played again"


def test_the_parameters_of_words_decide_a_swap(bench: Bench) -> None:
    built, model = cells.parents(bench.workspace, bench.config()), bench.model()

    def hashes(**index: float) -> set[str]:
        tree = bench.config().model_dump(mode="json")
        tree["index"] |= index
        config = type(bench.config()).model_validate(tree)
        swap = (Evidence("swap", "bm25"),)
        return {cell.hash for cell in cells.cells(config, bench.workspace, built, [model], ["research"], ["odd"], 1, swap) if cell.evidence}

    assert hashes() == hashes(memory_gib=3.0) != hashes(k1=2.0)
