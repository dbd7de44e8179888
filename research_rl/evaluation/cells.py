"""A cell of an evaluation: one model, played by one method on one question set of the workspace, as an artifact of its own.

Knows hashes, folders and files; plays nothing. Invariants: (1) whatever decides the results is in the cell's hash, and the hash is in
the folder's name, so that no cell overwrites another; (2) equal cells of two commands are one artifact, whatever they call the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.config import Config, PromptConfig, addresses, located, parameters
from research_rl.config.redact import redact_tree
from research_rl.errors import ConfigError, ManifestError, ModelError
from research_rl.evaluation.evidence import Evidence
from research_rl.evaluation.methods import find
from research_rl.evaluation.results import RECORD, HeldOutQuestion
from research_rl.paths import cache_folder, plain_name
from research_rl.pipeline import manifest, taped
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Workspace, deciding
from research_rl.pipeline.verified import Verified
from research_rl.process.hub import snapshot
from research_rl.serving.offer import TOKEN_VARIABLE, Offer, offers

__all__ = [
    "PARENTS",
    "REGISTRY",
    "STAGE",
    "Cell",
    "Model",
    "Registry",
    "cells",
    "content_sha256",
    "model",
    "model_folder",
    "names",
    "parents",
    "question_sets",
    "recorded",
    "standing",
]

STAGE = "cell"
"""What a cell's manifest says as its stage."""
PARENTS = ("prepare", "corpus", "embed", "index")
SECTIONS = STAGES["evaluate"].sections
_FOLDER = Path("artifacts") / "cells"
_SHOWN, _DIGITS = 12, 8
REGISTRY = "registry:"
"""How the name of a version in the model registry begins."""
_HUB, _SERVERS = "hub:", ("http://", "https://")
_NAMED = {"before": "policy", "after": "export"}
"""Models of the workspace by the name under which a command takes them: the policy before and after training."""


@dataclass(frozen=True)
class Model:
    """A model folder, the name that tables show, and the sha256 of its content.

    `prompt` is the one it was trained with, None where that is the workspace's. Where `offer` names a server that runs already, the
    folder is that of its tokenizer.
    """

    name: str
    folder: Path
    sha256: str
    prompt: PromptConfig | None = None
    offer: Offer | None = None

    @property
    def shown(self) -> str:
        """The name for tables: a model may be played with two prompts."""
        return f"{self.name} (prompt {self.prompt.path or self.prompt.template})" if self.prompt else self.name

    def config(self, config: Config, workspace: Workspace) -> Config:
        """Return the configuration that this model is played with; files of the workspace are named by their whole paths."""
        own = config.model_copy(update={"prompt": self.prompt}) if self.prompt else config
        if self.offer:
            own = own.model_copy(update={"serving": own.serving.model_copy(update={"engine": self.offer.engine})})
        return located(own, workspace.root)

    @property
    def label(self) -> str:
        """Its name as part of a folder's name."""
        return plain_name(self.name)


@dataclass(frozen=True)
class Cell:
    """One model, method and question set; `sample` counts repetitions of a drawn (not greedy) evaluation from 0.

    `evidence` is what was done to the passages that searches found, None for a plain evaluation.
    """

    model: Model
    method: str
    question_set: str
    sample: int
    hash: str
    root: Path
    evidence: Evidence | None = None

    @property
    def played(self) -> str:
        """The method, and what was done to the evidence, for tables."""
        return f"{self.method}, {self.evidence.shown}" if self.evidence else self.method

    @property
    def label(self) -> str:
        """A name for people, unique within a workspace."""
        again = f"-{self.sample + 1}" if self.sample else ""
        change = f"-{plain_name(self.evidence.shown)}" if self.evidence else ""
        return f"{self.model.label}-{self.method}-{plain_name(self.question_set)}{change}{again}-{self.hash[:_SHOWN]}"

    @property
    def folder(self) -> Path:
        """Where its artifact is, or will be: what was played under another name of the model stands under that name."""
        own = self.root / _FOLDER / self.label
        if (own / manifest.MANIFEST).is_file():
            return own
        # Names that begin with a dot are publications under way.
        others = sorted(own.parent.glob(f"[!.]*-{self.hash[:_SHOWN]}"))
        artifacts = ((other, manifest.found(other, verify=False)) for other in others)
        return next((other for other, artifact in artifacts if artifact and artifact.config_hash == self.hash), own)

    @property
    def journal(self) -> Path:
        """Where its answers are while it is unfinished."""
        # By the hash alone: under another name of its model an unfinished cell goes on where it was left.
        return Workspace(self.root).work(f"cell-{self.hash[:16]}") / "results.jsonl"

    @property
    def facts(self) -> dict[str, Any]:
        """What its manifest says about it."""
        about = {"model": self.model.name, "model_sha256": self.model.sha256}
        change = {"evidence": self.evidence.shown} if self.evidence else {}
        return {**about, "method": self.method, "question_set": self.question_set, "sample": self.sample, **change}


def names(models: Iterable[Model]) -> dict[Model, str]:
    """Return what tables call each of some models: models that share a name are told apart by the first digits of their hashes."""
    shown, alike = {each: each.shown for each in models}, dict[str, set[tuple[str, PromptConfig | None]]]()
    for each, name in shown.items():
        alike.setdefault(name, set()).add((each.sha256, each.prompt))
    return {each: f"{name} [{each.sha256[:_DIGITS]}]" if len(alike[name]) > 1 else name for each, name in shown.items()}


Registry = Callable[[str], Path]
"""Returns the folder of a registered version, named NAME@ALIAS or NAME/VERSION. Raises ConfigError and ServiceError."""


def model(choice: str, config: Config, workspace: Workspace, registry: Registry | None = None, option: str = "--model") -> Model:
    """Return the model that `choice` names: before, after, hub:NAME, registry:NAME@ALIAS, http://SERVER or a model folder.

    `option` is where it was named. Raises ConfigError, ModelError and ServiceError.
    """
    if choice.startswith(_SERVERS):
        return _served(choice, workspace, option)
    name, folder = model_folder(choice, config, workspace, registry, option, ("http://SERVER[#TOKENIZER_FOLDER]",))
    return Model(name, folder, content_sha256(folder, workspace))


def model_folder(
    choice: str,
    config: Config,
    workspace: Workspace,
    registry: Registry | None = None,
    option: str = "--model",
    others: Sequence[str] = (),
) -> tuple[str, Path]:
    """Return name and folder of the model that `choice` names, as `model` does, without reading its files. Raises as `model`.

    `others` is what a command takes besides, for the message about a choice that is none.
    """
    if stage := _NAMED.get(choice):
        try:
            manifest.load(workspace.folder(stage), verify=False)
        except ManifestError as error:
            raise ModelError(f"{option} {choice} is the artifact of stage {stage}, and {error}") from None
        return choice, workspace.folder(stage)
    if choice.startswith(_HUB):
        name, _, revision = choice.removeprefix(_HUB).partition("@")
        return name, snapshot(name, revision or "main", config.transfer, cache_folder() / "hub")
    if choice.startswith(REGISTRY) and registry:
        name = choice.removeprefix(REGISTRY)
        return name, registry(name)
    folder = Path(choice).expanduser().resolve()
    if not folder.is_dir():
        known = (*_NAMED, "hub:NAME[@REVISION]", *([f"{REGISTRY}NAME@ALIAS"] if registry else []), *others, "a folder")
        raise ConfigError(f"{option} {choice} is neither {' nor '.join(known)}; name one of them")
    return folder.name, folder


def _served(choice: str, workspace: Workspace, option: str) -> Model:
    """Return the model of a server that runs already; the folder of its tokenizer is named behind `#` unless the server's lies here."""
    url, _, named = choice.partition("#")
    addresses.check(url, f"set the token as {TOKEN_VARIABLE}")
    offer = _only(url, option)
    folder = Path(named or offer.root).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"{option} {url} serves {offer.model} from {offer.root}, which is no folder here; "
            f"name the folder of its tokenizer: {option} {url}#FOLDER"
        )
    content = content_sha256(folder, workspace)
    # What a server reads its weights from decides its answers, unless it cannot be seen from here: then address and names have to do.
    seen = Path(offer.root).is_dir() and not named
    sha256 = content if seen else hashlib.sha256(json.dumps([offer.url, offer.model, offer.root, content]).encode()).hexdigest()
    return Model(offer.model, folder, sha256, offer=offer)


def _only(url: str, option: str) -> Offer:
    served = offers(url)
    # An engine lists one model once for each of its names.
    if len({each.root for each in served}) != 1:
        names = ", ".join(each.model for each in served) or "none"
        raise ConfigError(f"{option} {url} serves {names}; start a server of one model for this")
    return served[0]


def content_sha256(folder: Path, workspace: Workspace) -> str:
    """Return one sha256 over names and contents of a folder's files; files that were read before and did not change are not read again."""
    if artifact := manifest.found(folder, verify=False):
        return artifact.hash
    # A folder of the user's own.
    hashed, digest = Verified(workspace.verified).sha256, hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{hashed(path)}\n".encode())
    return digest.hexdigest()


def question_sets(questions: Iterable[HeldOutQuestion], chosen: Sequence[str]) -> dict[str, list[HeldOutQuestion]]:
    """Return the questions of each chosen set (of all when none is) in the order of the file. Raises ConfigError for an unknown one."""
    by_source: dict[str, list[HeldOutQuestion]] = {}
    for question in questions:
        by_source.setdefault(question.data_source, []).append(question)
    if unknown := [name for name in chosen if name not in by_source]:
        known = ", ".join(by_source)
        raise ConfigError(f"--set {unknown[0]} is not among the workspace's test questions, which are {known}; add its file to data.test")
    return {name: by_source[name] for name in chosen} if chosen else by_source


def parents(workspace: Workspace, config: Config) -> dict[str, Manifest]:
    """Return the manifests of what every cell of a workspace is played with; the index may be a tape's. Raises ManifestError."""
    return {name: taped.loaded(name, config, workspace) for name in PARENTS}


def cells(
    config: Config,
    workspace: Workspace,
    built: Mapping[str, Manifest],
    models: Sequence[Model],
    methods: Sequence[str],
    sets: Sequence[str],
    samples: int,
    evidence: Sequence[Evidence] = (),
) -> list[Cell]:
    """Return the cells of a matrix, model by model, so that each model is served once: plain ones, and one for each change of evidence.

    Raises ConfigError for equal samples.
    """
    if samples > 1 and config.evaluation.temperature == 0:
        raise ConfigError(f"--samples {samples} of greedy text are equal; set evaluation.temperature above 0")
    # Without a change nothing is hashed of it: plain cells keep the hashes that they had.
    changes = {None: {}, **{each: {"evidence": each.decides(config.index)} for each in evidence}}
    decides = {each: parameters(each.config(config, workspace), SECTIONS) for each in models}
    return [
        Cell(each, method, name, sample, _hash(decides[each], built, each, method, name, sample, changes[change]), workspace.root, change)
        for each in models
        for method in methods
        for name in sets
        for change in changes
        for sample in range(samples)
    ]


def standing(cell: Cell) -> Manifest | None:
    """Return the manifest of a cell that was published before, None when there is none or its folder is torn."""
    return manifest.found(cell.folder)


def recorded(config: Config) -> dict[str, Any]:
    """Return the parameters that a cell keeps beside its results: its own sections and those of its parents.

    `config` is the one that its model is played with, see `Model.config`.
    """
    return redact_tree(parameters(config, deciding(PARENTS) | set(SECTIONS)))


def _hash(
    decides: Mapping[str, Any],
    built: Mapping[str, Manifest],
    model: Model,
    method: str,
    question_set: str,
    sample: int,
    change: Mapping[str, Any],
) -> str:
    content = {
        "parameters": decides,
        "parents": {name: artifact.hash for name, artifact in built.items()},
        "model": model.sha256,
        "method": [method, find(method).sha256],
        "set": question_set,
        "sample": sample,
        # Another grading gives other results for the same answers.
        "record": RECORD,
        **change,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
