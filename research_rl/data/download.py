"""Stage download: bring questions and one corpus into `data/`, every row checked while it is written.

Knows sources and files; leaves content quality to the validate stage. `data/` is the same, byte for byte, for the same
configuration and the same source files: it holds no time and no path of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from research_rl.config import DataConfig
from research_rl.data import flashrag
from research_rl.data.flashrag import Question
from research_rl.errors import ConfigError, DataError
from research_rl.stages import Context

__all__ = ["CORPUS", "SPLITS", "run"]

CORPUS = "corpus.jsonl"
SPLITS = ("train", "dev", "test")
GENERATED = "encyclopedia"

_REPORT_EVERY = 20_000


@dataclass(frozen=True)
class _Sources:
    """Local files of a source, by their names in the configuration, and what to record about it."""

    locate: Callable[[str], Path]
    facts: dict[str, Any]


def run(context: Context) -> None:
    """Publish `data/`: corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl. Raises ConfigError or DataError, leaving nothing."""
    data = context.config.data
    with context.publish() as staging:
        if data.source == "generated":
            from research_rl.data.encyclopedia import generate

            generate(data.generated, context.config.seed, staging.path)
            staging.facts["source"] = {"kind": "generated"}
            staging.counts.update(_count(staging.path, context))
            return
        sources = _folder(context) if data.source == "folder" else _hub(context)
        staging.facts["source"] = sources.facts
        staging.counts["corpus"] = _write_corpus(sources.locate(data.corpus), staging.path / CORPUS, context)
        for split in SPLITS:
            names: tuple[str, ...] = getattr(data, split)
            staging.counts[split] = _write_questions(names, sources, staging.path / f"{split}.jsonl")
            context.progress(f"{split}: {staging.counts[split]:,} questions", 0.9)


def data_source(name: str) -> str:
    """Return the set a question file belongs to: its parent folder's name (`musique/dev.jsonl` is `musique`), else "local"."""
    return PurePosixPath(name).parent.name or "local"


def _write_corpus(source: Path, target: Path, context: Context) -> int:
    rows = 0
    with target.open("wb", buffering=1 << 20) as stream:
        for rows, passage in enumerate(flashrag.read_passages(source), 1):
            stream.write(flashrag.to_line(passage))
            if rows % _REPORT_EVERY == 0:
                context.progress(f"corpus: {rows:,} passages", 0.5)
    return rows


def _write_questions(names: tuple[str, ...], sources: _Sources, target: Path) -> int:
    rows = 0
    with target.open("wb") as stream:
        for name, prefix in _prefixes(names).items():
            for question in _of_set(sources.locate(name), data_source(name), prefix):
                stream.write(flashrag.to_line(question))
                rows += 1
    return rows


def _prefixes(names: tuple[str, ...]) -> dict[str, str]:
    """Return what to put before the ids of each file: public sets share ids such as dev_0, and so do files of one set."""
    folders = [PurePosixPath(name).parent.name for name in names]
    return {
        name: (f"{folder}/" if folder else "") + (f"{PurePosixPath(name).stem}/" if folders.count(folder) > 1 else "")
        for name, folder in zip(names, folders, strict=True)
    }


def _of_set(path: Path, source: str, prefix: str) -> Iterator[Question]:
    for question in flashrag.read_questions(path):
        yield replace(question, id=prefix + question.id, metadata={**question.metadata, "data_source": source})


def _count(folder: Path, context: Context) -> dict[str, int]:
    """Check what the generator wrote by the same rules as foreign data."""
    context.progress("checking the generated rows", 0.9)
    counts = {split: sum(1 for _ in flashrag.read_questions(folder / f"{split}.jsonl")) for split in SPLITS}
    return {"corpus": sum(1 for _ in flashrag.read_passages(folder / CORPUS)), **counts}


def _folder(context: Context) -> _Sources:
    data = context.config.data
    if not data.folder:
        raise ConfigError("data.folder is empty but data.source=folder; set data.folder=<root of the FlashRAG-format files>")
    root = (context.workspace.root / Path(data.folder).expanduser()).resolve()
    if not root.is_dir():
        raise DataError(f"data.folder={data.folder} ({root}) is not a folder; set data.folder to the root of the FlashRAG-format files")
    missing = [name for name in _names(data) if not (root / name).is_file()]
    if missing:
        raise DataError(f"data.folder={root} has no {', '.join(missing)}; correct data.corpus, data.train, data.dev or data.test")
    return _Sources(lambda name: root / name, {"kind": "folder", "files": list(_names(data))})


def _names(data: DataConfig) -> tuple[str, ...]:
    names = (data.corpus, *data.train, *data.dev, *data.test)
    for split in SPLITS:
        given: tuple[str, ...] = getattr(data, split)
        if not given:
            raise ConfigError(f"data.{split}=[] names no question file; name at least one below the root")
        if len(set(given)) < len(given):
            raise ConfigError(f"data.{split}={list(given)} names a file twice; name each once")
    return tuple(dict.fromkeys(names))


def _hub(context: Context) -> _Sources:
    """Fetch the named files at one commit; a broken transfer goes on where it stopped at the next run."""
    from huggingface_hub import HfApi, hf_hub_download

    data, names = context.config.data, _names(context.config.data)
    commit = _hub_call(data, "", lambda: HfApi(endpoint=data.hub_endpoint).dataset_info(data.hub_repo, revision=data.hub_revision).sha)
    folder = context.workspace.work("download") / str(commit)
    paths: dict[str, Path] = {}
    for done, name in enumerate(names):
        context.progress(f"fetching {name}", 0.5 * done / len(names))
        fetched = _hub_call(
            data,
            name,
            lambda name=name: hf_hub_download(
                data.hub_repo, name, repo_type="dataset", revision=commit, endpoint=data.hub_endpoint, local_dir=folder
            ),
        )
        paths[name] = Path(str(fetched))
    return _Sources(paths.__getitem__, {"kind": "hub", "repository": data.hub_repo, "commit": commit, "files": list(names)})


def _hub_call(data: DataConfig, name: str, call: Callable[[], Any]) -> Any:
    """Run one hub request; what it raises becomes one DataError that names address, repository and revision."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"{data.hub_endpoint}/datasets/{data.hub_repo} at {data.hub_revision}" + (f", file {name}" if name else "")
    try:
        return call()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"cannot fetch {where}: {reason[0]}; check data.hub_endpoint, data.hub_repo, data.hub_revision and the network, "
            "or put the files in a folder and set data.source=folder"
        ) from error
