"""Builds stages in forked children that are killed, starved of space or run in pairs, and checks what is left.

Run as `python -m tests.fault.trials FAULT WHOLE ROOT STAGE TRIALS SEED`; prints one JSON line. This process imports what stages need and
never runs one itself, so that every fork is a fresh process at the price of a fork. Knows stages by the table alone.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from research_rl.config import Config, config_hash
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current, run_stage
from research_rl.pipeline.stages import STAGES, Workspace
from research_rl.planning import plan

CONFIG = Config.model_validate(
    {
        "data": {"generated": {"entities": 40, "train_questions": 8, "dev_questions": 4, "test_questions": 8}},
        "corpus": {"shard_rows": 100},
        "encoder": {"dim": 16, "shard_rows": 100},
        "index": {"shard_rows": 100},
    }
)
KNOWLEDGE = tuple(STAGES)[: tuple(STAGES).index("index") + 1]
"""The stages that need nothing but this package to be built."""
_CHANGING = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_SHARD = re.compile(r"\d{5}")


class Hook:
    """Counts the operations that change files below a folder, and kills the process just before the `fatal`-th."""

    def __init__(self, root: Path, fatal: int = 0) -> None:
        self.root, self.fatal, self.seen = str(root), fatal, 0

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(handle: int) -> None:
            self._count()
            fsync(handle)
            self._count()

        os.fsync = counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGING or (event == "open" and (arguments[2] or 0) & _WRITING and str(arguments[0]).startswith(self.root)):
            self._count()

    def _count(self) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int, *, deadly: bool) -> None:
    """Let no file of this process grow past `size` bytes: a write beyond is an error or, if deadly, the end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a child; return its wait status and what it returned, or the text of its error."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = stream.read()
        return os.waitpid(pid, 0)[1], json.loads(text) if text else None
    os.close(reader)
    code, answer = 0, None
    try:
        answer = work()
    except BaseException as error:  # noqa: BLE001 (the child's whole outcome is the answer)
        code, answer = 1, [type(error).__name__, str(error), traceback.format_exc()]
    with os.fdopen(writer, "w") as stream:
        stream.write(json.dumps(answer))
    os._exit(code)


def build(root: Path, stage: str, hook: Hook | None = None, *, size: int | None = None, deadly: bool = True, force: bool = False) -> Any:
    """Build one stage here; return its hash and the operations counted."""
    workspace = Workspace(root)
    if hook:
        hook.install()
    if size is not None:
        limit_files(size, deadly=deadly)
    found, _ = run_stage(stage, CONFIG, workspace, force=force)
    return found.hash, hook.seen if hook else 0


def template(root: Path, upto: str) -> None:
    """Build every stage of the knowledge side up to one, as far as they do not stand; import here what the last one imported."""
    for stage in KNOWLEDGE[: KNOWLEDGE.index(upto) + 1]:
        status, answer = forked(lambda stage=stage: [*build(root, stage, force=stage == upto), list(sys.modules)])
        if status:
            raise RuntimeError(answer)
    for name in answer[2]:
        with suppress(ImportError, AttributeError):
            importlib.import_module(name)


def copy(source: Path, target: Path, *, without: str | None = None) -> Path:
    """Copy a workspace by hard links; artifacts are never changed in place, or the next trial would show it."""
    shutil.rmtree(target, ignore_errors=True)
    left_out = Workspace(source).folder(without) if without else None
    shutil.copytree(source, target, copy_function=os.link, ignore=lambda folder, names: [n for n in names if Path(folder, n) == left_out])
    return target


def pieces(root: Path) -> dict[str, int]:
    """Return the finished shards of unfinished work by name, with the file each is."""
    found = (path for path in (root / "artifacts/.work").rglob("*") if path.is_file() and _SHARD.search(path.name))
    return {path.name: path.stat().st_ino for path in found if path.suffix not in (".tmp", ".json")}


def reopened(root: Path, stage: str, reference: str, *, old: bool = False) -> Any:
    """Look at what a fault left, resume, and return (accepted before, shards redone); raise AssertionError for a broken promise.

    With `old` the artifact of an earlier snapshot may stand.
    """
    workspace = Workspace(root)
    state = next(row for row in plan.state(CONFIG, workspace) if row.stage == stage)
    assert state.state in ("current", "missing", *(("stale",) if old else ())), f"a fault left {stage} {state.state}: {state.detail}"
    before = current(stage, CONFIG, workspace)
    assert before is None or before.hash == reference, "another artifact than the right one was accepted"
    kept = pieces(root)
    found, built = run_stage(stage, CONFIG, workspace)
    assert found.hash == reference, "the resumed artifact differs"
    assert current(stage, CONFIG, workspace), "the resumed artifact is not whole"
    folder = workspace.folder(stage)
    left = [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]
    assert not left, f"left behind: {left}"
    final = {path.name: path.stat().st_ino for path in folder.rglob("*")}
    # A shard may be several files of one number.
    redone = {_SHARD.findall(name)[0] for name, number in kept.items() if final.get(name) not in (None, number)}
    return before is not None, built * len(redone)


def kill(whole: Path, root: Path, stage: str, trials: int, seed: int) -> dict[str, Any]:
    """Kill a stage's build `trials` times, half of them while it replaces an artifact; return the tally."""
    draw = random.Random(seed)
    template(whole, stage)
    points: dict[bool, int] = {}
    for old in (False, True):
        copy(whole, root / "count", without=None if old else stage)
        _, (reference, points[old]) = forked(lambda old=old: build(root / "count", stage, Hook(root / "count"), force=old))
    sizes = [path.stat().st_size for path in Workspace(whole).folder(stage).rglob("*") if path.is_file()]
    tally = {"stage": stage, "trials": 0, "points": points[True], "killed": 0, "accepted": 0, "missing": 0, "redone": 0, "broken": []}
    for trial in range(trials):
        old = trial % 2 == 1
        target = copy(whole, root / "trial", without=None if old else stage)
        if trial % 4 < 3:
            # Every point in turn, from a place that depends on the seed.
            hook, size = Hook(target, 1 + (seed + trial) % points[old]), None
        else:
            hook, size = None, draw.randrange(max(sizes))
        status, answer = forked(lambda: build(target, stage, hook, size=size, force=old))  # noqa: B023 (the child ends within)
        tally["killed"] += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and status:
            tally["broken"].append({"trial": trial, "error": answer})
        status, answer = forked(lambda: reopened(target, stage, reference))  # noqa: B023
        tally["trials"] += 1
        if status:
            tally["broken"].append({"trial": trial, "error": answer})
            continue
        tally["accepted" if answer[0] else "missing"] += 1
        tally["redone"] = max(tally["redone"], answer[1])
    return tally


def snapshot(whole: Path, stage: str) -> str:
    """Let `stage` be the one whose artifact is of an earlier snapshot than its parents; return the hash that a build from nothing has.

    Passages behind the first shard changed, moved or went; no word's weight did, so that the lexical encoder stays the same.
    """
    _unchecked(whole, KNOWLEDGE)
    workspace = Workspace(whole)
    folder = workspace.folder("download")
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[150:180]:
        # A word twice: another text of the same words.
        row["contents"] += " " + row["contents"].split()[-1]
    rows[180:] = rows[:179:-1]
    found = manifest.load(folder)
    content = {entry.path: (folder / entry.path).read_bytes() for entry in found.files}
    content["corpus.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with manifest.publish(folder, "download", found.config_hash, {}, found.parameters) as staging:
        for name, some in content.items():
            (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.path / name).write_bytes(some)
        staging.counts |= found.counts
        staging.facts |= found.facts
    _unchecked(whole, KNOWLEDGE[1 : KNOWLEDGE.index(stage)])
    fresh = copy(whole, whole.with_name("fresh"), without=stage)
    return forked(lambda: build(fresh, stage))[1][0]


def _unchecked(whole: Path, stages: Sequence[str]) -> None:
    """Build what passages go through, and import here what that imported; the data's checks, which take seconds, are noted as passed."""
    workspace = Workspace(whole)
    for stage in stages:
        if stage == "validate":
            parents = {"download": manifest.load(workspace.folder("download"))}
            with manifest.publish(workspace.folder(stage), stage, config_hash(CONFIG, STAGES[stage].sections), parents):
                pass
        elif stage != "prepare":
            status, answer = forked(lambda stage=stage: [*build(whole, stage), list(sys.modules)])
            if status:
                raise RuntimeError(answer)
            for name in answer[2]:
                with suppress(ImportError, AttributeError):
                    importlib.import_module(name)


def refresh(whole: Path, root: Path, stage: str, trials: int, seed: int) -> dict[str, Any]:
    """Kill a stage's build `trials` times while it replaces the artifact of an earlier snapshot, of which it takes what did not change."""
    reference = snapshot(whole, stage)
    kept = {path.stat().st_ino for path in Workspace(whole).folder(stage).iterdir()}
    copy(whole, root / "count")
    _, (made, points) = forked(lambda: build(root / "count", stage, Hook(root / "count")))
    assert points > 20, f"{stage} was not built again"
    linked = sum(path.stat().st_ino in kept for path in Workspace(root / "count").folder(stage).iterdir())
    tally = {"stage": stage, "trials": 0, "points": points, "same": made == reference, "linked": linked, "killed": 0, "accepted": 0}
    tally |= {"redone": 0, "broken": []}
    for trial in range(trials):
        target = copy(whole, root / "trial")
        # Points at equal distances, in turn where there are more trials than points.
        hook = Hook(target, 1 + (seed + trial * max(1, points // trials)) % points)
        status, answer = forked(lambda: build(target, stage, hook))  # noqa: B023 (the child ends within)
        tally["killed"] += os.WIFSIGNALED(status)
        status, answer = forked(lambda: reopened(target, stage, reference, old=True))  # noqa: B023
        tally["trials"] += 1
        if status:
            tally["broken"].append({"trial": trial, "error": answer})
            continue
        tally["accepted"] += answer[0]
        tally["redone"] = max(tally["redone"], answer[1])
    return tally


def starve(whole: Path, root: Path, stage: str, trials: int, seed: int) -> dict[str, Any]:
    """Build with a limit on the size of files, drawn below the largest the stage writes; return errors and what resuming gave."""
    draw = random.Random(seed)
    template(whole, stage)
    _, (reference, _) = forked(lambda: build(copy(whole, root / "count", without=stage), stage))
    largest = max(path.stat().st_size for path in Workspace(whole).folder(stage).rglob("*") if path.is_file())
    tally: dict[str, Any] = {"stage": stage, "trials": trials, "errors": [], "broken": []}
    for _ in range(trials):
        target, size = copy(whole, root / "trial", without=stage), draw.randrange(largest)
        status, answer = forked(lambda: build(target, stage, size=size, deadly=False))  # noqa: B023
        tally["errors"].append(answer[:2] if status else None)
        status, answer = forked(lambda: reopened(target, stage, reference))  # noqa: B023
        tally["broken"] += [answer] * bool(status)
    return tally


def fill(whole: Path, root: Path, stage: str, trials: int, seed: int) -> dict[str, Any]:
    """Build in `root`, a small disk, with ever less room; then give the room back and resume."""
    draw = random.Random(seed)
    template(whole, stage)
    shutil.copytree(whole, root, dirs_exist_ok=True)
    folder = Workspace(root).folder(stage)
    reference = json.loads(json.dumps(forked(lambda: build(root, stage))[1]))[0]
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    tally: dict[str, Any] = {"stage": stage, "trials": trials, "errors": [], "broken": []}
    for _ in range(trials):
        shutil.rmtree(folder)
        room = draw.randrange(max(1, size // 2))
        with (root / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, max(4096, shutil.disk_usage(root).free - room // 4096 * 4096))
        status, answer = forked(lambda: build(root, stage))
        tally["errors"].append(answer[:2] if status else None)
        (root / "ballast").unlink()
        status, answer = forked(lambda: reopened(root, stage, reference))
        tally["broken"] += [answer] * bool(status)
    return tally


def pair(whole: Path, root: Path, stage: str, trials: int, seed: int) -> dict[str, Any]:
    """Let two processes build the same stage at once, `trials` times; both must succeed and agree."""
    template(whole, stage)
    tally: dict[str, Any] = {"stage": stage, "trials": trials, "broken": []}
    for trial in range(trials):
        target = copy(whole, root / "trial", without=stage if trial % 2 else None)
        other = os.fork()
        if not other:
            os._exit(forked(lambda: build(target, stage, force=True))[0] != 0)  # noqa: B023
        status, answer = forked(lambda: build(target, stage, force=True))  # noqa: B023
        _, theirs = os.waitpid(other, 0)
        if status or theirs:
            tally["broken"].append({"trial": trial, "error": answer, "other": theirs})
            continue
        status, answer = forked(lambda: reopened(target, stage, answer[0]))  # noqa: B023
        tally["broken"] += [answer] * bool(status)
    return tally


FAULTS = {"kill": kill, "refresh": refresh, "starve": starve, "fill": fill, "pair": pair}


def main() -> None:
    """Run the trials named on the command line."""
    fault, whole, root, stage, trials, seed = sys.argv[1:]
    print(json.dumps(FAULTS[fault](Path(whole), Path(root), stage, int(trials), int(seed))))


if __name__ == "__main__":
    main()
