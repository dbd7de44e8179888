"""Files in a local folder, used where they lie."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_rl.config import DataConfig
from research_rl.data.sources import Remote, nearest
from research_rl.errors import ConfigError, DataError

__all__ = ["FolderSource"]

_CHUNK = 1 << 20
_LISTED = 10_000
_LONGEST_NAME = 255


class FolderSource:
    """A folder; its path is recorded nowhere."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def open(cls, data: DataConfig, base: Path) -> FolderSource:
        """Return the source of data.folder, relative to `base`. Raises ConfigError when unset, DataError when it is no folder."""
        if not data.folder:
            raise ConfigError("data.folder is empty but data.source=folder; set data.folder=<root of the FlashRAG-format files>")
        root = (base / Path(data.folder).expanduser()).resolve()
        if not root.is_dir():
            raise DataError(f"data.folder={data.folder} ({root}) is not a folder; set data.folder to the root of the FlashRAG-format files")
        return cls(root)

    @property
    def key(self) -> str:
        """The folder."""
        return f"folder:{self._root}"

    @property
    def facts(self) -> dict[str, Any]:
        """Only the kind: where the folder lies says nothing about what it holds."""
        return {"kind": "folder"}

    def names(self) -> list[str]:
        """Return the files below the folder, at most 10,000."""
        # The names serve only to suggest a close one, and the folder may be a whole home directory.
        files = (path for path in self._root.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path, _ in zip(files, range(_LISTED), strict=False))

    def locate(self, name: str) -> Remote:
        """Return the file of that name. Raises DataError when there is none."""
        path = self._root / name
        if any(len(part.encode()) > _LONGEST_NAME for part in path.parts):
            raise DataError(f"{name[:40]!r}... has a part above {_LONGEST_NAME} bytes, a file system's limit; correct the name in data.*")
        if not path.is_file():
            near = nearest(name, self.names())
            raise DataError(
                f"data.folder={self._root} has no {name}{near}; correct data.corpus, data.train, data.dev, data.test or data.files"
            )
        return Remote(name, str(path), path.stat().st_size, "", True, path=path)

    @contextmanager
    def read(self, remote: Remote, start: int, stop: int | None) -> Generator[Iterator[bytes]]:
        """Open a part of the file."""
        with (self._root / remote.name).open("rb") as stream:
            stream.seek(start)
            yield _limited(stream, None if stop is None else stop - start)


def _limited(stream: Any, left: int | None) -> Iterator[bytes]:
    while block := stream.read(_CHUNK if left is None else min(_CHUNK, left)):
        left = None if left is None else left - len(block)
        yield block
