"""Open files by the ending of their name, decompressed while they are read. Knows archives and streams; knows no row."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from research_rl.errors import DataError

__all__ = ["SUFFIXES", "open_plain"]

SUFFIXES = (".gz", ".zip", ".zst", ".bz2", ".xz")
_BUFFER = 1 << 20
_PACKED = 1 << 17


@contextmanager
def open_plain(path: Path) -> Generator[tuple[str, BinaryIO]]:
    """Open the content of a file: the name it has without compression, and its bytes.

    Raises DataError for a missing or damaged file, also while it is read inside the block, and for a .zip without exactly
    one file of data.
    """
    try:
        with _opened(path) as (name, stream):
            yield name, stream
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct data.folder or the file's name in data.*") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name a file") from None
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is cut off or damaged ({error}); fetch it again") from None


@contextmanager
def _opened(path: Path) -> Generator[tuple[str, BinaryIO]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            member = _only_member(path, archive)
            with archive.open(member) as stream:
                yield PurePosixPath(member).name, io.BufferedReader(cast(Any, stream), _BUFFER)
    elif path.suffix == ".zst":
        with _zstandard(path) as stream:
            yield path.stem, stream
    elif path.suffix in (".gz", ".bz2", ".xz"):
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        with openers[path.suffix](path, "rb") as stream:
            yield path.stem, cast(BinaryIO, io.BufferedReader(stream, _BUFFER))
    else:
        with path.open("rb", buffering=_BUFFER) as stream:
            yield path.name, stream


@contextmanager
def _zstandard(path: Path) -> Generator[BinaryIO]:
    import zstandard

    try:
        with path.open("rb") as packed:
            yield cast(BinaryIO, io.BufferedReader(_Frames(packed), _BUFFER))
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is cut off or damaged ({error}); fetch it again") from None


class _Frames(io.RawIOBase):
    """The content of Zstandard frames. The library's own reader takes a cut-off frame for a whole one, so frame ends are checked here."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._plain, self._frame = packed, b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._plain and self._more():
            pass
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _more(self) -> bool:
        from zstandard import ZstdDecompressor

        rest: bytes = self._frame.unused_data if self._frame and self._frame.eof else b""
        block = rest or self._packed.read(_PACKED)
        if self._frame is None or (self._frame.eof and block):
            self._frame = ZstdDecompressor().decompressobj()
        if not block and not self._frame.eof:
            raise EOFError("the last frame has no end")
        self._plain = self._frame.decompress(block) if block else b""
        return bool(block)


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    names = [item.filename for item in archive.infolist() if not item.is_dir() and not item.filename.startswith("__MACOSX")]
    names = [name for name in names if name.endswith((".jsonl", ".tsv"))] or names
    if len(names) != 1:
        raise DataError(f"{path} holds {len(names)} files of data; exactly one is needed")
    return names[0]
