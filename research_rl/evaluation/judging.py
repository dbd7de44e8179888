"""Judge the saved predictions of an evaluation with a language model. Knows evaluations, verdicts and their artifact; leaves prompts
to `judge_presets`, requests to `reward.chat`, and numbers to `judge_metrics`.

Invariants: (1) whatever decides the verdicts (evaluation, preset, prompt, model, decoding) is in the hash, and the hash is in the
folder's name, so that no judgement overwrites another; (2) a question has one verdict, and a verdict once given stands: a resumed run
asks only about questions without one, and so does `again` of a judgement that stands; (3) a question about which the judge failed is
counted as wrong and as failed, and never left out; (4) a judge that is down, or gone, ends the run with one message, and nothing is
published.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from tenacity import wait_fixed

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.evaluation.judge_metrics import measure
from research_rl.evaluation.judge_presets import ATTEMPTS, WAIT_S, Case, Opinion, Preset
from research_rl.evaluation.results import Result, load_evaluation, read_results
from research_rl.paths import plain_name
from research_rl.pipeline import json_lines, manifest
from research_rl.pipeline.lock import locked
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.run import room
from research_rl.pipeline.stages import Progress, Workspace
from research_rl.process.tokens import token_from
from research_rl.reward.chat import TOKEN, ChatClient, ChatError, ChatReply, Fault

__all__ = ["METRICS", "STAGE", "VERDICTS", "Judged", "Judgement", "Protocol", "judge", "judge_all", "read_verdicts", "standing"]

STAGE = "judgement"
"""What a judgement's manifest says as its stage."""
_FOLDER = Path("artifacts") / "judgements"
VERDICTS, METRICS = "verdicts.jsonl", "metrics.json"
"""The files of a judgement."""
_SHOWN = 12
_IN_A_ROW = 10
"""Least questions in a row without an answer after which the judge counts as gone."""
_REMEDY = {
    Fault.OUTAGE: "start the judge, or raise judge.timeout_s",
    Fault.DENIED: f"set {TOKEN}, name the address up to its version, such as http://host:port/v1, and a model that it serves",
    Fault.REJECTED: "name a model or a server that takes such requests, or another preset",
    Fault.UNUSABLE: "name another model",
}


@dataclass(frozen=True)
class Protocol:
    """A preset and the model that is asked; `swapped` exchanges the order of what is shown, see `judge_presets.Case`."""

    preset: Preset
    model: str
    swapped: bool = False

    @property
    def parameters(self) -> dict[str, Any]:
        """All that decides a verdict, besides what is judged."""
        preset = self.preset
        return {
            "preset": preset.name,
            "prompt": preset.prompt_hash(swapped=self.swapped),
            "swapped": self.swapped,
            "model": self.model,
            "decoding": dict(preset.decoding),
            "attempts": ATTEMPTS,
            "wait_s": WAIT_S,
            "asks_blank": preset.asks_blank,
            "most_chars": preset.most_chars,
        }

    def case(self, result: Result) -> Case:
        """Return what is asked about a result."""
        return Case(result.question, tuple(result.golden_answers), result.prediction[: self.preset.most_chars], self.swapped)


@dataclass(frozen=True)
class Judged:
    """What became of one question: `correct` is the verdict, None with the reason in `error` when the judge gave none.

    `said`, `rationale`, `extracted` and `confidence` are as in `judge_presets.Opinion`, and text that nobody vouches for. `served` is
    the model's name as its server gives it. `asked` is False for a blank prediction that the preset calls wrong without a question.
    """

    row: int
    id: str
    data_source: str
    question: str
    golden_answers: tuple[str, ...]
    prediction: str
    em: float
    lost: bool
    asked: bool
    correct: bool | None
    said: str = ""
    rationale: str = ""
    extracted: str | None = None
    confidence: float | None = None
    served: str = ""
    error: str | None = None

    @classmethod
    def of(cls, result: Result, *, asked: bool = True, correct: bool | None = None, **about: Any) -> Judged:
        """Return the record of a result."""
        copied = {name: getattr(result, name) for name in ("row", "id", "data_source", "question", "prediction", "em", "lost")}
        return cls(**copied, golden_answers=tuple(result.golden_answers), asked=asked, correct=correct, **about)


@dataclass(frozen=True)
class Judgement:
    """A judged evaluation: `evaluation` is its folder, `folder` where the verdicts are, or will be."""

    evaluation: Path
    protocol: Protocol
    hash: str
    root: Path

    @property
    def folder(self) -> Path:
        """Where its artifact is, or will be."""
        swapped = "_swapped" if self.protocol.swapped else ""
        about = f"{plain_name(self.evaluation.resolve().name)}-{self.protocol.preset.name}{swapped}-{plain_name(self.protocol.model)}"
        return self.root / _FOLDER / f"{about}-{self.hash[:_SHOWN]}"


def judge(
    config: Config,
    workspace: Workspace,
    evaluation: Path,
    protocol: Protocol,
    progress: Progress,
    *,
    again: bool = False,
    on_wait: Callable[[str], None] | None = None,
) -> Judgement:
    """Return the judgement of an evaluation: the one that stands, or a new one after asking about every question without a verdict.

    With `again` the failures of one that stands are asked about once more. Raises ManifestError and DataError for a folder that is no
    evaluation, ConfigError without a judge, and ServiceError when it is down.
    """
    artifact = load_evaluation(evaluation)
    judgement = Judgement(evaluation, protocol, _hash(protocol, artifact), workspace.root)
    key = f"{STAGE}-{judgement.hash[:16]}"
    # Not the lock of the workspace: a training need not wait for a judge, nor a judge for a training.
    with locked(workspace, math.inf, f"research judge {evaluation}", on_wait, name=key), room("the judge", workspace):
        if again or manifest.found(judgement.folder) is None:
            _complete(config, judgement, artifact, workspace.work(key), progress)
    return judgement


def judge_all(
    config: Config,
    workspace: Workspace,
    asked: Sequence[tuple[Path, Protocol]],
    progress: Progress,
    *,
    again: bool = False,
    on_wait: Callable[[str], None] | None = None,
) -> list[Judgement]:
    """Judge several evaluations one after the other, see `judge`; those before an error stand."""
    judged: list[Judgement] = []
    for evaluation, protocol in asked:

        def tell(text: str, share: float, evaluation: Path = evaluation) -> None:
            progress(f"{evaluation}: {text}", (len(judged) + share) / len(asked))

        judged.append(judge(config, workspace, evaluation, protocol, tell, again=again, on_wait=on_wait))
    return judged


def standing(root: Path, evaluation: str | None = None, preset: str | None = None) -> list[tuple[Path, Manifest]]:
    """Return the judgements of a workspace by folder: of the evaluation with this hash and by this preset, where they are named.

    Swapped ones, which only show what the order decides, are left out. A manifest's `parameters` are those of `Protocol`, its parent is
    the evaluation.
    """
    folders = sorted((root / _FOLDER).glob("[!.]*"))
    artifacts = [(folder, artifact) for folder in folders if (artifact := manifest.found(folder, verify=False)) and artifact.stage == STAGE]
    return [
        (folder, artifact)
        for folder, artifact in artifacts
        if not artifact.parameters["swapped"]
        and (evaluation is None or evaluation in artifact.parents.values())
        and (preset is None or artifact.parameters["preset"] == preset)
    ]


def read_verdicts(folder: Path) -> list[Judged]:
    """Return the verdicts of a judgement artifact in the order of the questions."""
    return list(_read(folder / VERDICTS))


def _hash(protocol: Protocol, evaluation: Manifest) -> str:
    content = {**protocol.parameters, "evaluation": evaluation.hash}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _complete(config: Config, judgement: Judgement, artifact: Manifest, work: Path, progress: Progress) -> None:
    results, stands = read_results(judgement.evaluation), manifest.found(judgement.folder) is not None
    verdicts = _Verdicts(work / VERDICTS, read_verdicts(judgement.folder) if stands else ())
    # One short outage fails every question under way, so fewer failures in a row than these do not mean that the judge is gone.
    asking = _Asking(judgement.protocol, verdicts, len(results), progress, max(_IN_A_ROW, config.judge.concurrency))
    asking.run(config, [result for result in results if result.row not in verdicts.by_row], publishes=not stands)
    judged = [verdicts.by_row.get(result.row) or asking.failed[result.row] for result in results]
    protocol, evaluation = judgement.protocol, config.evaluation
    metrics = measure(judged, evaluation.bootstrap, evaluation.seed, confidence=protocol.preset.reads_confidence)
    # Over an artifact of the same hash, which holds the same verdicts and lacks some.
    with manifest.publish(judgement.folder, STAGE, judgement.hash, {artifact.stage: artifact}, protocol.parameters) as staging:
        (staging.path / VERDICTS).write_bytes(b"".join(json_lines.to_line(asdict(item)) for item in judged))
        (staging.path / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        staging.counts |= {"questions": len(judged), "failed": len(asking.failed), "lost": sum(item.lost for item in judged)}
        staging.facts |= {name: metrics[name]["mean"] for name in ("accuracy", "published_accuracy", "em")}
    # Last: before its publication the journal is all there is of the new verdicts.
    shutil.rmtree(work, ignore_errors=True)


def _read(path: Path) -> Iterable[Judged]:
    """Yield the records of a file; what is no record of this version is passed over, and so asked about again."""
    names = {item.name for item in fields(Judged)}
    for _, record in json_lines.read(path):
        if isinstance(record, dict) and record.keys() == names:
            values = cast(dict[str, Any], record)
            values["golden_answers"] = tuple(values["golden_answers"])
            yield Judged(**values)


class _Verdicts:
    """The verdicts of a judgement under way by row: those of the artifact that stands, and a journal of those that came since."""

    def __init__(self, path: Path, standing: Iterable[Judged]) -> None:
        self._path = path
        # By row, so that a question that stands in both counts once; failures are asked about again.
        self.by_row = {item.row: item for item in (*standing, *_read(path)) if item.correct is not None}

    def add(self, judged: Judged) -> None:
        """Keep one verdict. Raises OSError when the disk does not take it."""
        # Not forced onto the disk, which takes milliseconds: what a power failure loses is asked about again.
        json_lines.append(self._path, asdict(judged))
        self.by_row[judged.row] = judged


@dataclass
class _Asking:
    """One run over the questions without a verdict; `failed` holds those that have none after it, by row."""

    protocol: Protocol
    verdicts: _Verdicts
    total: int
    progress: Progress
    most_in_a_row: int
    failed: dict[int, Judged] = field(default_factory=dict[int, Judged])
    answered: int = 0
    in_a_row: int = 0

    def run(self, config: Config, missing: Sequence[Result], *, publishes: bool) -> None:
        """Ask about every missing question. Raises ConfigError without a judge's address, and ServiceError when it is down.

        Where something `publishes` verdicts that came before, few failures are no reason to withhold them.
        """
        asked_before = any(item.asked for item in self.verdicts.by_row.values())
        waiting = [result for result in missing if not self._settled(result)]
        if not waiting:
            return
        if config.judge.url is None:
            raise ConfigError("no judge: set judge.url, or name with --url an OpenAI-compatible address such as http://127.0.0.1:8000/v1")
        last = asyncio.run(self._all(config, waiting))
        if last and not self.answered and not (publishes and asked_before):
            raise self._down(last)

    def _settled(self, result: Result) -> bool:
        """Keep the verdict on a blank prediction that needs no judge; return whether there is one."""
        if self.protocol.preset.asks_blank or result.prediction.strip():
            return False
        self.verdicts.by_row[result.row] = Judged.of(result, asked=False, correct=False, said="blank")
        return True

    async def _all(self, config: Config, waiting: Sequence[Result]) -> ChatError | None:
        """Ask about all; return the error of the question that failed last, if one did."""
        left, last = list(reversed(waiting)), None

        async def worker(chat: ChatClient) -> None:
            nonlocal last
            while left:
                # Nothing is awaited between the look at the list and this, so no other worker takes the last question.
                last = await self._one(chat, left.pop()) or last

        async with ChatClient(config.judge, token_from(TOKEN)) as chat:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(config.judge.concurrency, len(waiting))):
                        group.create_task(worker(chat))
            except ExceptionGroup as errors:  # the first ends all others: a judge that is gone, a disk that is full
                raise errors.exceptions[0] from None
        return last

    async def _one(self, chat: ChatClient, result: Result) -> ChatError | None:
        preset, body = self.protocol.preset, self.protocol.preset.body(self.protocol.case(result), self.protocol.model)

        def read(reply: ChatReply) -> tuple[Opinion, str]:
            return preset.read(reply.content), reply.model

        try:
            opinion, served = await chat.ask(body, read, ATTEMPTS, wait_fixed(WAIT_S))
        except ChatError as error:
            self._note(result, error)
            return error
        self.answered, self.in_a_row = self.answered + 1, 0
        self.verdicts.add(Judged.of(result, **asdict(opinion), served=served))
        self._tell()
        return None

    def _note(self, result: Result, error: ChatError) -> None:
        """Count a failure. Raises ServiceError when so many came in a row that the judge must be gone."""
        self.failed[result.row] = Judged.of(result, error=str(error))
        unusable = error.fault is Fault.UNUSABLE  # the judge is there, whatever it writes
        self.answered, self.in_a_row = self.answered + unusable, 0 if unusable else self.in_a_row + 1
        if self.in_a_row >= self.most_in_a_row:
            raise self._down(error)
        self._tell()

    def _down(self, error: ChatError) -> ServiceError:
        return ServiceError(
            f"the judge gives no answer, {self.in_a_row} questions in a row had none: {error}; {_REMEDY[error.fault]}, and run the "
            f"command again: the {len(self.verdicts.by_row):,} of {self.total:,} verdicts that came are kept"
        )

    def _tell(self) -> None:
        done, failed = len(self.verdicts.by_row) + len(self.failed), len(self.failed)
        self.progress(f"{done:,} of {self.total:,} questions" + (f", {failed:,} failed" if failed else ""), done / self.total)
