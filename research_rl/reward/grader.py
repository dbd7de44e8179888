"""The reward of an episode as configured: a published rule, or a weighted sum of terms. Knows a Trajectory and its question's
row; asks the judge; leaves the published rules to `reward`.

    score = sum of weight * term, each term from 0 to 1          (rule: composed)
    score = the published rule                                   (rule: paper, repository)
    score = the negative terms alone where reward.strict is on and the answer is suspect

Invariants: (1) the parts of a Grade sum to its score; (2) without `reward.strict` the published rules stay as published; (3) a
judge that fails is counted and replaced by the term `reward.judge.fallback` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from research_rl.config import JudgeConfig, RewardConfig, RewardTerm
from research_rl.episode.trajectory import Author, Trajectory
from research_rl.process.tokens import token_from
from research_rl.reward import hacking, rules
from research_rl.reward.chat import TOKEN
from research_rl.reward.judge import Judge, Verdict
from research_rl.reward.metrics import contains, normalize, recall
from research_rl.reward.rules import Grade

__all__ = ["Grader", "GradingTarget"]


@dataclass(frozen=True)
class GradingTarget:
    """What an episode is graded against; `supporting` holds the ids of the passages that answer, empty when unknown."""

    question: str
    golds: tuple[str, ...]
    supporting: tuple[str, ...] = ()


class Grader:
    """Grades episodes by one RewardConfig; use it within one event loop, and close it or use it as an async context manager."""

    def __init__(self, config: RewardConfig, judge: JudgeConfig, eos_token: str) -> None:
        self._config, self._eos = config, eos_token
        self._judge = Judge(judge, str(config.judge.model), config.judge.max_chars, token_from(TOKEN)) if config.asks_judge else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections to the judge."""
        if self._judge is not None:
            await self._judge.aclose()

    async def grade(self, trajectory: Trajectory, target: GradingTarget) -> Grade:
        """Return the reward with its parts."""
        text = rules.graded_text(trajectory.segments).removesuffix(self._eos)
        if self._config.strict.enabled:
            text = hacking.plain(text)
            # Both sides, so that a look-alike letter neither wins nor costs an honest answer.
            target = replace(target, golds=tuple(hacking.plain(gold) for gold in target.golds))
        # Rule composed names no published rule; its terms take prediction and format from the stricter one.
        rule = "paper" if self._config.rule == "paper" else "repository"
        grade = rules.score_text(text, target.golds, rule, ended_by_eos=trajectory.ended_by_eos)
        grade = replace(grade, suspicion=self._suspicion(trajectory, grade.prediction, target))
        if self._config.rule != "composed":
            return self._strict(replace(grade, parts=_published_parts(grade)))
        graded, parts = await self._terms(_Facts(trajectory, target, grade, text))
        return self._strict(replace(graded, score=sum(parts.values()), parts=parts))

    def _suspicion(self, trajectory: Trajectory, prediction: str, target: GradingTarget) -> str | None:
        written = "".join(s.text for s in trajectory.segments if s.author is Author.MODEL)
        results = [s.text for s in trajectory.segments if s.author is Author.SEARCH]
        return hacking.suspicion(written, rules.answer(written), prediction, target.golds, results, self._config.strict)

    def _strict(self, grade: Grade) -> Grade:
        if not self._config.strict.enabled or grade.suspicion is None:
            return grade
        # Terms that cost are kept: a suspect answer must not be the way out of a penalty.
        parts = {name: min(0.0, part) for name, part in grade.parts.items()}
        return replace(grade, score=sum(parts.values()), parts=parts, reason=f"suspect: {grade.suspicion}")

    async def _terms(self, facts: _Facts) -> tuple[Grade, dict[str, float]]:
        parts: dict[str, float] = {}
        grade = facts.grade
        for term in self._config.terms:
            if term.needs_format and not grade.format_ok:
                value = 0.0
            elif term.kind == "judge":
                value, grade = await self._judged(facts, grade)
            else:
                value = _TERMS[term.kind](facts, term)
            parts[term.kind] = term.weight * value
        return grade, parts

    async def _judged(self, facts: _Facts, grade: Grade) -> tuple[float, Grade]:
        """Return the judge's verdict as 0 or 1, or the fallback where it gives none."""
        # Each question costs time and money: an exact match needs no judge, nothing and a suspect answer earn nothing whatever it says.
        if grade.em or not normalize(grade.prediction) or (grade.suspicion and self._config.strict.enabled):
            return grade.em, grade
        verdict = (
            await self._judge.ask(facts.target.question, facts.target.golds, grade.prediction) if self._judge else Verdict(None, "no judge")
        )
        if verdict.correct is not None:
            return float(verdict.correct), replace(grade, judge="asked")
        fallback = {"f1": grade.f1, "em": grade.em, "zero": 0.0}[self._config.judge.fallback]
        return fallback, replace(grade, judge=f"failed: {verdict.error}")


@dataclass(frozen=True)
class _Facts:
    trajectory: Trajectory
    target: GradingTarget
    grade: Grade
    text: str


def _published_parts(grade: Grade) -> dict[str, float]:
    """Split a published reward into what F1 and what the format alone earned."""
    return {"answer": grade.score if grade.f1 else 0.0, "format": 0.0 if grade.f1 else grade.score}


def _published(rule: rules.Rule) -> Callable[[_Facts, RewardTerm], float]:
    def term(facts: _Facts, term: RewardTerm) -> float:
        return rules.score_text(facts.text, facts.target.golds, rule, ended_by_eos=facts.trajectory.ended_by_eos).score

    return term


def _retrieval(facts: _Facts, term: RewardTerm) -> float:
    """Share of the supporting passages that any search found; 0 where none is known."""
    retrieved = [passage for search in facts.trajectory.searches for passage in search.passage_ids]
    # Without known passages every rollout of the group gets the same, so that the term gives no signal.
    return recall(retrieved, facts.target.supporting) or 0.0


def _searches(facts: _Facts, term: RewardTerm) -> float:
    """Different queries that got an answer, as a share of `target`: a query said again counts once."""
    answered = {normalize(search.query) for search in facts.trajectory.searches if search.fault is None}
    return min(1.0, len(answered) / term.target)


def _length(facts: _Facts, term: RewardTerm) -> float:
    """Tokens the model wrote, as a share of `target`."""
    return min(1.0, sum(len(s.ids) for s in facts.trajectory.segments if s.author is Author.MODEL) / term.target)


_TERMS: dict[str, Callable[[_Facts, RewardTerm], float]] = {
    "em": lambda facts, term: facts.grade.em,
    "f1": lambda facts, term: facts.grade.f1,
    "contains": lambda facts, term: contains(facts.grade.prediction, facts.target.golds),
    "format": lambda facts, term: float(facts.grade.format_ok),
    "paper": _published("paper"),
    "repository": _published("repository"),
    "retrieval": _retrieval,
    "searches": _searches,
    "length": _length,
    "suspicion": lambda facts, term: float(facts.grade.suspicion is not None),
}
