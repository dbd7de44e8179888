"""Questions whose answers may not have been found by reasoning: marks, and metrics with and without them. Knows results; plays none.

Two marks: (1) the question itself stands in what search showed, by `SIZE` consecutive normalised words of it, or by all of a shorter
one: the corpus may hold the test set (n-grams as in GPT-3's analysis, arXiv 2005.14165, appendix C); (2) the policy answers it
without search, in a closed-book evaluation: it may know it by heart.

Metrics without the questions of mark (2) are of harder questions too, not only of unseen ones: compare policies on the same questions,
not one policy's two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from research_rl.errors import DataError
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import METRICS, means
from research_rl.reward.metrics import normalize, shares_words

__all__ = ["SIZE", "Marks", "in_passages", "mark", "with_and_without"]

SIZE = 13
"""Consecutive words of a question that stand in a passage hardly by chance."""


@dataclass(frozen=True)
class Marks:
    """Marks of one question: its words stand in a passage that search showed; it is answered right in closed book.

    `closed_book` is None where the closed-book evaluation lost the question, has it not, or was not made.
    """

    in_passages: bool
    closed_book: bool | None

    @property
    def clean(self) -> bool:
        """Whether neither mark is set; a mark that is unknown is none."""
        return not (self.in_passages or self.closed_book)


def in_passages(question: str, texts: Iterable[str]) -> bool:
    """Return whether `SIZE` consecutive words of the question, all of them if it has fewer, stand in one of the texts."""
    words = normalize(question).split()
    return bool(words) and shares_words(words, min(SIZE, len(words)), texts)


def mark(results: Sequence[Result], closed_book: Sequence[Result] | None = None) -> list[Marks]:
    """Return the marks of each result, in order; `closed_book` are results of the same questions played without search.

    Raises DataError when the closed-book evaluation shares no question.
    """
    known = {result.key: result.em == 1 for result in closed_book or () if not result.lost}
    if closed_book is not None and results and not any(result.key in known for result in results):
        raise DataError(
            f"the closed-book evaluation ({len(closed_book)} questions, {len(known)} of them played) shares none of the {len(results)} "
            "questions; evaluate in closed book on the same test set"
        )
    return [Marks(in_passages(result.question, result.shown), known.get(result.key)) for result in results]


def with_and_without(
    results: Sequence[Result], marks: Sequence[Marks], resamples: int, seed: int, names: Iterable[str] = METRICS
) -> dict[str, Any]:
    """Return `marked` (questions by mark) and metrics of these `names` with intervals, as `means` gives them: of `all` questions, and
    without those of each mark and of any.

    Raises ValueError unless there is one mark a result.
    """
    pairs = list(zip(results, marks, strict=True))
    subsets = {
        "all": results,
        "without_in_passages": [result for result, marked in pairs if not marked.in_passages],
        "without_closed_book": [result for result, marked in pairs if not marked.closed_book],
        "without_any": [result for result, marked in pairs if marked.clean],
    }
    marked = {name.removeprefix("without_"): len(results) - len(rest) for name, rest in subsets.items() if name != "all"}
    marked["closed_book_unknown"] = sum(item.closed_book is None for item in marks)
    return {"marked": marked, **{name: means(rest, names, resamples, seed) for name, rest in subsets.items()}}
