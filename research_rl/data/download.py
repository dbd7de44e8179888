"""Stage download: bring questions and one corpus into `data/`, every row checked while it is written.

Knows sources and files; leaves content quality to the validate stage. `data/` is the same, byte for byte, for the same
configuration and the same source files: it holds no time and no path of this machine.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from research_rl.config import Config, DataConfig
from research_rl.data import flashrag, transfer
from research_rl.data.catalogue import expand
from research_rl.data.compressed import SUFFIXES, open_plain
from research_rl.data.flashrag import Question
from research_rl.data.pieces import Fetched, Located
from research_rl.data.sources import ChangedError, Remote, Sources
from research_rl.errors import ConfigError, DataError
from research_rl.pipeline.copying import place
from research_rl.pipeline.manifest import Manifest, Staging
from research_rl.pipeline.outside import differences
from research_rl.pipeline.stages import Context, Progress, Workspace
from research_rl.pipeline.verified import Verified

__all__ = ["CORPUS", "FILES", "SPLITS", "newer", "outside", "run"]

CORPUS = "corpus.jsonl"
SPLITS = ("train", "dev", "test")
FILES = "files"
GENERATED = "encyclopedia"

_REPORT_EVERY = 20_000
_LONGEST_NAME = 255
_EXPANSION = 3
"""Typical size of text against its compressed form, for the check of the disk."""
_LARGEST_EXPANSION = 200
"""Bytes for each packed one, beyond `_HARMLESS`, that a further file may unpack to: text takes 3 to 20, a file made to fill disks 1,000."""
_HARMLESS = 1 << 30


def run(context: Context) -> None:
    """Publish `data/`: corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl and `files/`. Raises ConfigError or DataError, leaving nothing.

    What was fetched before an error or a kill stays in artifacts/.work/download, and the next run goes on from there.
    """
    work = context.workspace.work("download")
    try:
        with context.publish() as staging:
            if context.config.data.source == "generated":
                _generated(context, staging)
            else:
                _fetched(context, staging, work)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"the disk is full ({error}); free some room and rerun, what is fetched is kept") from error
    shutil.rmtree(work, ignore_errors=True)


def outside(config: Config, workspace: Workspace, published: Manifest) -> list[str]:
    """Return which files of data.folder have other bytes than `published` recorded; those that are not here count as unchanged."""
    if config.data.source != "folder" or not config.data.folder:
        return []
    root = workspace.root / Path(config.data.folder).expanduser()
    recorded = {name: str(facts["sha256"]) for name, facts in published.facts.get("source", {}).get("files", {}).items()}
    # A name with a scheme is a whole address of another source, for which `newer` asks.
    paths = {name: root / name for name in recorded if "://" not in name and (root / name).is_file()}
    return differences("data.folder", {name: recorded[name] for name in paths}, paths, Verified(workspace.verified))


def newer(config: Config, workspace: Workspace, published: Manifest, progress: Progress) -> list[str]:
    """Ask the sources what they hold now; return one line for every file that is not known to be the one in `data/`.

    Sizes, versions (ETag, date, commit) and checksums travel, no content. Raises DataError where a source does not answer.
    """
    if config.data.source == "generated":
        return []
    data = _expanded(config.data)
    recorded: dict[str, Any] = published.facts.get("source", {}).get("files", {})
    sources = Sources(data, config.transfer, workspace.root)
    located = transfer.locate(_names(data), sources, data.sha256, config.transfer, progress)
    return [reason for file in located if (reason := _difference(file.remote, recorded.get(file.name, {})))]


def _difference(remote: Remote, known: Mapping[str, str]) -> str:
    """Say why a file of a source may not be the one that was recorded; "" where it is, or lies on this machine (see `outside`)."""
    if remote.path is not None:
        return ""
    if remote.checksum and remote.checksum[0] == "sha256" and not remote.encoding:
        before, now = known.get("sha256", ""), remote.checksum[1]
    else:
        before, now = known.get("version", ""), remote.version
    if not now:
        return f"{remote.address} has neither version nor checksum, so it is fetched again to see whether it changed"
    return "" if now == before else f"{remote.address} changed: {before or 'no version'} before, {now} now"


def _generated(context: Context, staging: Staging) -> None:
    from research_rl.data.encyclopedia import generate

    generate(context.config.data.generated, context.config.data_seed, staging.path)
    staging.facts["source"] = {"kind": "generated"}
    staging.counts.update(_count(staging.path, context))


def _fetched(context: Context, staging: Staging, work: Path) -> None:
    data = _expanded(context.config.data)
    sources = Sources(data, context.config.transfer, context.workspace.root)
    with ExitStack() as stack:
        files = _bring(context, data, sources, work, stack)
        staging.facts["source"] = {**sources.facts, "files": {name: file.facts for name, file in files.items()}}
        for target, names in data.files.items():
            _place([files[name] for name in names], staging.path / FILES / target, work)
        staging.counts["corpus"] = _write_corpus(files[data.corpus].path, staging.path / CORPUS, context)
        for split in SPLITS:
            names: tuple[str, ...] = getattr(data, split)
            staging.counts[split] = _write_questions(names, files, staging.path / f"{split}.jsonl")
            context.progress(f"{split}: {staging.counts[split]:,} questions", 0.9)


def _bring(context: Context, data: DataConfig, sources: Sources, work: Path, stack: ExitStack) -> dict[str, Fetched]:
    """Fetch all files; when one changed at its source meanwhile, look again, and keep what did not change."""
    limits, names = context.config.transfer, _names(data)
    for attempt in range(1, limits.attempts + 1):
        located = transfer.locate(names, sources, data.sha256, limits, context.progress)
        # Files of a local folder are read in place: only fetching writes to the work folder and needs its lock.
        if attempt == 1 and any(file.remote.path is None for file in located):
            stack.enter_context(transfer.locked(work))
        # Resolved: `data/` may be a link to another disk, whose target is yet to be made.
        transfer.check_room(located, work, context.workspace.folder("download").resolve(), _output(located, data))
        try:
            return transfer.fetch(located, work, limits, context.progress)
        except ChangedError:
            if attempt == limits.attempts:
                raise
    raise AssertionError("unreachable")


def _output(located: list[Located], data: DataConfig) -> int:
    """Estimate the bytes of `data/`; fetched files that are only linked into it count nothing."""
    linked = {names[0] for target, names in data.files.items() if len(names) == 1 and not _unpacked(names[0], target)}
    sizes = {file.name: file.remote.size or 0 for file in located if file.remote.path is not None or file.name not in linked}
    return sum(size * (_EXPANSION if PurePosixPath(name).suffix in SUFFIXES else 1) for name, size in sizes.items())


def _place(parts: list[Fetched], target: Path, work: Path) -> None:
    """Put a further file under its name: linked when it was fetched as it is, else decompressed, joined or copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unpack = [part.encoded or (len(parts) == 1 and _unpacked(part.path.name, target.name)) for part in parts]
    # Only what was fetched into the work folder is linked: an edit of a user's own file would alter `data/` as well.
    if len(parts) == 1 and not unpack[0] and parts[0].path.is_relative_to(work):
        place(parts[0].path, target)
        return
    with target.open("wb") as sink:
        for part, packed in zip(parts, unpack, strict=True):
            with _opened(part.path, packed) as stream:
                if packed:
                    _unpack(stream, sink, part.path)
                else:
                    shutil.copyfileobj(stream, sink, 1 << 20)


def _unpack(stream: BinaryIO, sink: BinaryIO, path: Path) -> None:
    """Copy what a packed file holds. Raises DataError as soon as it is more than such a file should hold."""
    size, most = 0, max(_HARMLESS, _LARGEST_EXPANSION * path.stat().st_size)
    while piece := stream.read(1 << 20):
        size += len(piece)
        if size > most:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes and unpacks to more than {most:,}, {_LARGEST_EXPANSION} times as many or 1 GiB; "
                "if that is right, unpack it yourself and name the plain file in data.files"
            )
        sink.write(piece)


@contextmanager
def _opened(path: Path, packed: bool) -> Generator[BinaryIO]:
    if packed:
        with open_plain(path) as (_, stream):
            yield stream
    else:
        with path.open("rb") as stream:
            yield stream


def _unpacked(name: str, target: str) -> bool:
    """Whether a file of that name is to be decompressed into `target`."""
    suffix = PurePosixPath(name).suffix
    return suffix in SUFFIXES and PurePosixPath(target).suffix != suffix


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


def _write_questions(names: tuple[str, ...], files: Mapping[str, Fetched], target: Path) -> int:
    rows = 0
    with target.open("wb") as stream:
        for name, prefix in _prefixes(names).items():
            for question in _of_set(files[name].path, data_source(name), prefix):
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


def _expanded(data: DataConfig) -> DataConfig:
    """Return the configuration with bare set names replaced by their files."""
    return data.model_copy(update={split: tuple(expand(name, split) for name in getattr(data, split)) for split in SPLITS})


def _names(data: DataConfig) -> tuple[str, ...]:
    names = (data.corpus, *data.train, *data.dev, *data.test, *(name for parts in data.files.values() for name in parts))
    for split in SPLITS:
        given: tuple[str, ...] = getattr(data, split)
        if not given:
            raise ConfigError(f"data.{split}=[] names no question file; name at least one below the root")
        if len(set(given)) < len(given):
            raise ConfigError(f"data.{split}={list(given)} names a file twice; name each once")
    for target, parts in data.files.items():
        if not parts or not target or target.startswith("/") or ".." in PurePosixPath(target).parts:
            raise ConfigError(f"data.files: {target!r}={list(parts)}; use a name below data/files/ and at least one file of the source")
        if any(len(part.encode()) > _LONGEST_NAME for part in PurePosixPath(target).parts):
            raise ConfigError(f"data.files: {target[:40]!r}... has a part above {_LONGEST_NAME} bytes, a file system's limit; shorten it")
    if strange := set(data.sha256) - set(names):
        raise ConfigError(
            f"data.sha256 names {sorted(strange)}, which are not among the files; use the names of data.corpus, train, dev, test or files"
        )
    return tuple(dict.fromkeys(names))
