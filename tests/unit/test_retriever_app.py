"""An index that cannot be opened, or that is cut short while it is served, makes the service fail with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from research_rl.config import RetrieverConfig
from research_rl.errors import ManifestError, ServiceError
from research_rl.retriever import opened
from research_rl.retriever.app import RetrieverService
from research_rl.retriever.edition import Edition
from research_rl.retriever.opened import OpenedFiles
from research_rl.retriever.retriever import Retriever


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError("no"), KeyError("canary"), MemoryError()])
def test_an_index_that_cannot_be_opened_is_a_failure_with_its_reason(error: Exception) -> None:
    def fails() -> Retriever:
        raise error

    service = RetrieverService(fails, RetrieverConfig())
    service._start()
    assert service.state == "failed" and not service.ready
    assert isinstance(service.failure, ServiceError)
    assert str(service.failure).startswith(f"the index cannot be opened ({type(error).__name__}: ")


def test_a_file_that_is_cut_short_is_named_and_one_that_is_replaced_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "_EVERY_S", 0.0)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"x" * 5000)
    second.write_bytes(b"x" * 5000)
    files = OpenedFiles([first, second])
    (tmp_path / "new").write_bytes(b"")
    (tmp_path / "new").replace(first)
    files.check()
    with second.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ManifestError, match=r"second was cut to 100 bytes of 5,000 while it was served; remove"):
        files.check()
    service = RetrieverService(lambda: cast(Retriever, None), RetrieverConfig())

    class Cut:
        check_files = staticmethod(files.check)

    service.edition = cast(Edition, SimpleNamespace(retriever=Cut))
    service.check_files()
    assert service.state == "failed" and "was cut to 100 bytes" in str(service.failure)
    files.close()
