"""The stages of the pipeline: their order, parents and parameters. Knows names; each stage's work lives elsewhere.

One table serves every driver: the command line, the Prefect tasks and dvc.yaml (which a test compares with it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research_rl.config import Config, config_hash, located, parameters
from research_rl.errors import ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest, Staging
from research_rl.pipeline.meter import Meter
from research_rl.pipeline.verified import Verified

__all__ = ["STAGES", "Context", "Progress", "Stage", "Workspace", "deciding", "measured"]

Progress = Callable[[str, float], None]
"""Called with a short text and the share done (0 to 1)."""


def silent(text: str, share: float) -> None:
    """Progress for callers that do not watch."""


@dataclass(frozen=True)
class Stage:
    """One stage: `function` is `module:name`, called with a Context; it publishes `folder`.

    `sections` are what decides the artifact: sections of the configuration, or single parameters such as `serving.dtype`.
    """

    name: str
    function: str
    parents: tuple[str, ...]
    sections: tuple[str, ...]
    folder: str
    summary: str
    outside: str = ""
    """`module:name` of a function (config, workspace, manifest) that returns in what the user's own files, from which the artifact was
    built, are others now, one line a file; for evaluations, that another version graded them."""
    newer: str = ""
    """`module:name` of a function (config, workspace, manifest, progress) that asks other machines and returns why the artifact is
    behind what they hold now, one line a reason."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of params.yaml that decide the artifact: `sections`, and `seed` where an empty data.seed or train.seed falls back to it."""
        falls_back = {"data", "data.seed", "train"} & set(self.sections)
        return ("seed", *self.sections) if falls_back else self.sections


@dataclass(frozen=True)
class Workspace:
    """A folder with params.yaml, data/ and artifacts/. All paths are absolute."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Return the folder that holds the artifact of `stage`."""
        return self.root / STAGES[stage].folder

    def previous(self, stage: str) -> Path:
        """Return the folder that holds what the newest artifact of `stage` replaced, for stages that keep it."""
        return self.root / "artifacts" / "previous" / self.folder(stage).name

    def work(self, name: str) -> Path:
        """Return the folder for unfinished, resumable work of `name`; no reader takes it for an artifact."""
        return self.root / "artifacts" / ".work" / name

    @property
    def verified(self) -> Path:
        """The database that remembers which files were read and found whole."""
        return self.work("verified.sqlite")

    @property
    def services(self) -> Path:
        """Folder of pid files and logs of the services started for this workspace."""
        return self.root / ".services"


@dataclass(frozen=True)
class Context:
    """What a stage function is given: configuration, verified parents, where to publish, whom to tell.

    `force` is true when the caller wants the work done anew, whatever unfinished work stands.
    """

    stage: Stage
    config: Config
    workspace: Workspace
    parents: dict[str, Manifest]
    progress: Progress
    force: bool = False
    meter: Meter = field(default_factory=Meter)

    @property
    def config_hash(self) -> str:
        """Hash of the parameters that decide this stage's artifact."""
        # A prompt file of the workspace counts by its content, wherever this process was started.
        return config_hash(located(self.config, self.workspace.root), self.stage.sections)

    @property
    def parameters(self) -> dict[str, Any]:
        """The values behind that hash."""
        return parameters(located(self.config, self.workspace.root), self.stage.sections)

    def parent(self, name: str) -> Path:
        """Return the folder of a parent artifact."""
        if name not in self.parents:
            raise ManifestError(f"stage {self.stage.name} has no parent {name!r}; its parents are {list(self.parents)}")
        return self.workspace.folder(name)

    def standing(self) -> Manifest | None:
        """Return the whole artifact that this one replaces, from which finished parts may be taken; None where all is to be made anew."""
        if self.force:
            return None
        try:
            hashed = Verified(self.workspace.verified).sha256
            artifact = manifest.load(self.workspace.folder(self.stage.name), hashed=hashed)
        except ManifestError:  # none, or one that was torn or altered
            return None
        return artifact if artifact.stage == self.stage.name else None

    @contextmanager
    def publish(self, *, keep: bool = False) -> Generator[Staging]:
        """Open the publication of this stage's artifact, see `manifest.publish`; what it took is kept beside it, see `measured`.

        With `keep` the artifact that it replaces becomes the workspace's `previous` one.
        """
        folder, previous = self.workspace.folder(self.stage.name), self.workspace.previous(self.stage.name) if keep else None
        with manifest.publish(folder, self.stage.name, self.config_hash, self.parents, self.parameters, previous) as staging:
            yield staging
        # Beside the artifact, not in it: a manifest holds no time, so that equal inputs give equal bytes.
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"manifest": manifest.load(folder, verify=False).hash, "finished": finished, **self.meter.read(), **staging.measured}
        path = _measured(self.workspace, self.stage.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note, indent=1) + "\n")


def measured(workspace: Workspace, artifact: Manifest) -> dict[str, Any]:
    """Return what building an artifact took here (`finished` in UTC, `seconds`, `peak_mib`, the stage's own figures).

    Empty when it was built elsewhere.
    """
    try:
        # The file outlives the artifact that it was written for, for example when `dvc pull` replaces the folder.
        note: dict[str, Any] = json.loads(_measured(workspace, artifact.stage).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if note.pop("manifest", None) == artifact.hash else {}


def _measured(workspace: Workspace, stage: str) -> Path:
    return workspace.work("measured") / f"{stage}.json"


_REWARD = ("reward", "judge.url", "judge.max_tokens")
"""What decides a reward: its terms, and which judge is asked for how long a reply. The judge's time limits, proxy and concurrency do not."""


_EVALUATED = ("prompt", "episode", *_REWARD, "evaluation.rows", "evaluation.rows_per_set", "evaluation.temperature", "evaluation.seed", "evaluation.bootstrap", "evaluation.published_limits", "serving.engine", "serving.dtype")  # fmt: skip
"""What decides an evaluation. How many episodes run at once and how many questions may be lost do not; of `serving`, engine and number
format alone decide greedy text."""


def _table(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


STAGES = _table(
    Stage("download", "research_rl.data.download:run", (), ("data",), "data", "raw questions and passages", "research_rl.data.download:outside", "research_rl.data.download:newer"),
    Stage("validate", "research_rl.validation.stage:run_stage", ("download",), ("validation",), "artifacts/validated", "data-quality report"),
    # prepare and corpus read nothing of validate: it is a parent so that data which fails its checks goes no further.
    Stage("prepare", "research_rl.data.prepare:run", ("download", "validate"), ("data.seed", "prepare"), "artifacts/prepared", "questions as parquet"),
    Stage("corpus", "research_rl.corpus.build:run", ("download", "validate"), ("corpus",), "artifacts/corpus", "passage store"),
    Stage("embed", "research_rl.embedding.build:run", ("corpus",), ("encoder",), "artifacts/embeddings", "passage vectors", "research_rl.embedding.models:outside"),
    Stage("index", "research_rl.index.build:run", ("corpus", "embed"), ("retriever.memory_gib", "reranker", "index"), "artifacts/index", "search index", "research_rl.index.own_file:outside"),
    Stage("policy", "research_rl.training.policy:run", (), ("seed", "policy", "prompt"), "artifacts/policy", "initial policy", "research_rl.training.policy_files:outside"),
    Stage("baseline", "research_rl.evaluation.evaluate:run_baseline", ("policy", "prepare", "corpus", "embed", "index"), _EVALUATED, "artifacts/baseline", "evaluation before training", "research_rl.evaluation.results:outside"),
    Stage("train", "research_rl.training.train:run", ("policy", "prepare", "corpus", "embed", "index"), ("prompt", "episode", *_REWARD, "train"), "artifacts/train", "GRPO"),
    Stage("export", "research_rl.training.export:run", ("policy", "train"), (), "artifacts/model", "trained policy as a Hugging Face folder"),
    Stage("evaluate", "research_rl.evaluation.evaluate:run_trained", ("export", "prepare", "corpus", "embed", "index"), _EVALUATED, "artifacts/evaluation", "evaluation after training", "research_rl.evaluation.results:outside"),
    Stage("report", "research_rl.report.build:run", ("train", "baseline", "evaluate"), (), "artifacts/report", "curves, paired difference, trajectories"),
)  # fmt: skip


def deciding(names: Iterable[str]) -> set[str]:
    """Return the sections that decide the artifacts of these stages and of all stages before them."""
    sections, waiting = set[str](), [*names]
    while waiting:
        stage = STAGES[waiting.pop()]
        sections.update(stage.sections)
        waiting += stage.parents
    return sections
