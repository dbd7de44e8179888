"""A workspace is backed up while others write to it, destroyed and restored; a torn backup restores nothing."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from research_rl import config
from research_rl.cli import main
from research_rl.errors import ConfigError, ManifestError
from research_rl.pipeline import backup as module
from research_rl.pipeline import manifest
from research_rl.pipeline.backup import backup, restore
from research_rl.pipeline.stages import Workspace
from research_rl.planning.plan import state

BLOCK = b"x" * 50_000


def silent(_: str) -> None:
    pass


def publish(workspace: Workspace, stage: str, number: int) -> None:
    with manifest.publish(workspace.folder(stage), stage, f"{number:064}", {}) as staging:
        for name in ("first", "second"):
            (staging.path / name).write_bytes(BLOCK + str(number).encode())


@pytest.fixture(name="workspace")
def _workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    assert main(["init", "-w", str(workspace.root)]) == 0
    for stage in ("download", "corpus", "index"):
        publish(workspace, stage, 0)
    for name in ("artifacts/nights/accepted.jsonl", "mlartifacts/1/run/model", "artifacts/.work/tracking/run.jsonl", "dvc.lock"):
        (workspace.root / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.root / name).write_text(name)
    (workspace.root / "artifacts/.work/train-1").mkdir(parents=True)
    (workspace.root / "artifacts/.work/train-1/checkpoint").write_bytes(BLOCK)
    with closing(sqlite3.connect(workspace.root / "mlflow.db")) as database:
        database.executescript("PRAGMA journal_mode=WAL; CREATE TABLE debit (n INTEGER); CREATE TABLE credit (n INTEGER);")
    return workspace


@contextmanager
def written_to(workspace: Workspace) -> Iterator[None]:
    """Have both tables of the database grow by one in each transaction, and the index published again and again."""
    over, begun = threading.Event(), threading.Event()

    def transactions() -> None:
        with closing(sqlite3.connect(workspace.root / "mlflow.db")) as database:
            number = 0
            while not over.is_set():
                with database:
                    database.execute("INSERT INTO debit VALUES (?)", (number,))
                    database.execute("INSERT INTO credit VALUES (?)", (number,))
                number += 1
                begun.set()

    def publications() -> None:
        for number in range(1, 3):
            publish(workspace, "index", number)
            over.wait(0.01)

    threads = [threading.Thread(target=target) for target in (transactions, publications)]
    for thread in threads:
        thread.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_was_backed_up_while_others_wrote_is_whole_again(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    with written_to(workspace):
        found = backup(workspace, folder, silent)
    assert found.counts == {"artifacts": 3, "databases": 1}
    shutil.rmtree(workspace.root)
    restore(workspace, folder, silent)
    with closing(sqlite3.connect(workspace.root / "mlflow.db")) as database:
        rows = [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("debit", "credit")]
        assert rows[0] == rows[1] > 0 and database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for stage in ("download", "corpus", "index"):
        manifest.load(workspace.folder(stage))
    saved = {name: content for name, content in tree(folder).items() if name != manifest.MANIFEST}
    restored = {name: content for name, content in tree(workspace.root).items() if not name.startswith("mlflow.db-")}
    assert restored == saved and "artifacts/nights/accepted.jsonl" in restored and "artifacts/.work/tracking/run.jsonl" in restored
    assert not any("checkpoint" in name for name in restored)


def test_an_artifact_that_is_replaced_again_and_again_is_named(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editions = iter(range(100))
    monkeypatch.setattr(module, "_edition", lambda root: {"artifacts/index": str(next(editions)).encode()})
    with pytest.raises(ManifestError, match=r"changed in each of 5 passes .*back up between two stages"):
        backup(workspace, tmp_path / "backup", silent)
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest"])
def test_a_torn_backup_restores_nothing(workspace: Workspace, tmp_path: Path, damage: str) -> None:
    folder, empty = tmp_path / "backup", Workspace(tmp_path / "empty")
    backup(workspace, folder, silent)
    file = folder / ("manifest.json" if damage == "manifest" else "artifacts/corpus/first")
    content = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes(content[:-10] if damage == "cut" else content.replace(b"x", b"y", 1) if damage == "flip" else content[:-2])
    with pytest.raises(ManifestError):
        restore(empty, folder, silent)
    assert not empty.root.exists()


def test_a_workspace_with_files_is_left_alone_unless_told(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    backup(workspace, folder, silent)
    publish(workspace, "corpus", 7)
    (workspace.folder("corpus") / "left").write_text("of another build")
    with pytest.raises(ConfigError, match=r"has artifacts, data, .*mlflow\.db, params\.yaml; name an empty workspace, or --replace"):
        restore(workspace, folder, silent)
    restore(workspace, folder, silent, replace=True)
    assert manifest.load(workspace.folder("corpus")).config_hash == f"{0:064}"
    assert not (workspace.folder("corpus") / "left").exists()


def test_the_command_backs_up_restores_and_refuses(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = tmp_path / "backup", tmp_path / "other"
    assert main(["backup", str(folder), "-w", str(workspace.root)]) == 0
    assert "1 databases, 3 artifacts" in capsys.readouterr().out
    assert main(["backup", str(folder), "-w", str(workspace.root)]) == 1
    assert "exists; name a folder that does not" in capsys.readouterr().err
    assert main(["restore", str(workspace.folder("index")), "-w", str(other)]) == 1
    assert "an artifact of stage index, no backup" in capsys.readouterr().err
    assert main(["restore", str(folder), "-w", str(other)]) == 0
    assert (other / "params.yaml").read_bytes() == (workspace.root / "params.yaml").read_bytes()


def test_what_was_current_is_current_after_a_disaster(tmp_path: Path) -> None:
    workspace, other = Workspace(tmp_path / "workspace"), Workspace(tmp_path / "other")
    sizes = ("entities=60", "train_questions=64", "dev_questions=8", "test_questions=16")
    assert main(["init", "-w", str(workspace.root)]) == 0
    assert main(["run", "download", "-w", str(workspace.root), *(f"data.generated.{size}" for size in sizes)]) == 0
    before = state(config.load(workspace.root / "params.yaml"), workspace)
    assert (before[0].stage, before[0].state) == ("download", "current")
    backup(workspace, tmp_path / "backup", silent)
    shutil.rmtree(workspace.root)
    restore(other, tmp_path / "backup", silent)
    assert state(config.load(other.root / "params.yaml"), other) == before
