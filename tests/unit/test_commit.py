"""The note of what DVC was given: one that a killed run left torn means that DVC is given the artifacts again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.versioning.commit import _note, _recorded

HASHES = {"corpus": "0123"}


@pytest.mark.parametrize("text", ["", '{"corpus": "01', "\0\0\0\0", "[]"])
def test_a_torn_note_is_none(text: str, tmp_path: Path) -> None:
    for name in ("dvc.lock", "dvc.yaml", "data.dvc"):
        (tmp_path / name).touch()
    note = tmp_path / "work" / "recorded.json"
    _note(note, HASHES)
    assert _recorded(tmp_path, note, HASHES) and not _recorded(tmp_path, note, {"corpus": "4567"})
    assert list(note.parent.iterdir()) == [note]
    note.write_text(text)
    assert not _recorded(tmp_path, note, HASHES)
