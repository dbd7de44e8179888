"""Open files by the ending of their name, decompressed while they are read. Knows archives and streams; knows no row.

Invariant: memory is bounded by constants of this module, whatever a file holds: packed bytes are decompressed in small
portions, and an archive that asks for a larger window is refused before the window is allocated.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from research_rl.errors import DataError

__all__ = ["LONGEST_LINE", "SUFFIXES", "lines", "open_plain"]

SUFFIXES = (".gz", ".zip", ".zst", ".bz2", ".xz")
LONGEST_LINE = 1 << 24
"""Bytes of the longest line that is read."""
_BUFFER = 1 << 20
# A Zstandard block of 128 KiB takes at least 4 bytes, so what this many packed bytes hold cannot exceed 32 MiB.
_PACKED = 1 << 10
# The window up to which the `zstd` command decompresses unless told otherwise; `xz -9` needs half of it.
_LARGEST_WINDOW = 1 << 27
# Bits 0 and 6 of an entry's flags: encrypted, and strongly encrypted.
_ZIP_ENCRYPTED = 0x41
# zipfile limits what one read decompresses to for these alone: 4 KiB of its bzip2 or LZMA may become gigabytes at once.
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


@contextmanager
def open_plain(path: Path) -> Generator[tuple[str, BinaryIO]]:
    """Open the content of a file: the name it has without compression, and its bytes.

    Raises DataError for a missing or damaged file, also while it is read inside the block, for a .zip without exactly
    one file of data, and for an archive packed in a way that cannot be read or that needs too much memory.
    """
    try:
        with _opened(path) as (name, stream):
            yield name, stream
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct data.folder or the file's name in data.*") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name a file") from None
    except (EOFError, zipfile.BadZipFile, lzma.LZMAError, zlib.error) as error:
        raise _damaged(path, error) from None
    # What zipfile raises for a feature of the format that it lacks.
    except NotImplementedError as error:
        raise DataError(f"{path} cannot be unpacked ({error}); pack it again with `zip`, or as .gz, .zst, .bz2 or .xz") from None
    except OSError as error:
        if error.errno is not None:  # gzip and bz2 raise an OSError without a number for damaged content
            raise
        raise _damaged(path, error) from None


def lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a stream with their ends. Raises DataError for a line above LONGEST_LINE bytes, which is not read to its end."""
    number = 0
    # One byte more than is allowed, so that a line of exactly the limit is told from one that goes on.
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}:{number}: the line exceeds {LONGEST_LINE:,} bytes, the longest that is read; end each row with a line break "
                "or split it"
            )
        yield line


def _damaged(path: Path, error: Exception) -> DataError:
    if "memory" in str(error).lower():  # both libraries name their limit in words only
        return DataError(
            f"{path} needs more than {_LARGEST_WINDOW >> 20} MiB of memory to decompress ({error}); compress it again with "
            "`zstd --long=27` or `xz -9`, or less"
        )
    return DataError(f"{path} is cut off or damaged ({error}); fetch it again")


@contextmanager
def _opened(path: Path) -> Generator[tuple[str, BinaryIO]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            member = _only_member(path, archive)
            with archive.open(member) as stream:
                yield PurePosixPath(member.filename).name, io.BufferedReader(cast(Any, stream), _BUFFER)
    elif path.suffix in (".zst", ".xz"):
        with _framed(path) as stream:
            yield path.stem, stream
    elif path.suffix in (".gz", ".bz2"):
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
        with openers[path.suffix](path, "rb") as stream:
            yield path.stem, cast(BinaryIO, io.BufferedReader(stream, _BUFFER))
    else:
        with path.open("rb", buffering=_BUFFER) as stream:
            yield path.name, stream


@contextmanager
def _framed(path: Path) -> Generator[BinaryIO]:
    import zstandard

    openers: dict[str, Callable[[], Any]] = {
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj(),
        # liblzma counts its own tables beside the window, hence the addition.
        ".xz": lambda: lzma.LZMADecompressor(memlimit=_LARGEST_WINDOW + _BUFFER),
    }
    try:
        with path.open("rb", buffering=_BUFFER) as packed:
            yield cast(BinaryIO, io.BufferedReader(_Frames(packed, openers[path.suffix]), _BUFFER))
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from None


class _Frames(io.RawIOBase):
    """The content of frames that follow each other, decompressed in small portions.

    The Zstandard library's own reader takes a cut-off frame for a whole one, so frame ends are checked here; the standard
    library's reader of .xz files has no limit on memory.
    """

    def __init__(self, packed: BinaryIO, begin: Callable[[], Any]) -> None:
        self._packed, self._begin = packed, begin
        self._plain, self._rest, self._frame = b"", b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        # A portion may decompress to nothing yet, and an empty read would mean the end of the file.
        while not self._plain and self._more():
            pass
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _more(self) -> bool:
        # What stands behind the end of a frame is the beginning of the next one.
        packed, self._rest = self._rest or self._packed.read(_PACKED), b""
        block = packed.lstrip(b"\0") if self._frame and self._frame.eof else packed  # .xz files may be padded with zeros
        if self._frame is None or (self._frame.eof and block):
            self._frame = self._begin()
        if not packed and not self._frame.eof:
            raise EOFError("the last frame has no end")
        self._plain = self._frame.decompress(block) if block else b""
        self._rest = self._frame.unused_data if self._frame.eof and block else b""
        return bool(packed)


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # Archives made on macOS hold metadata of every file below this name.
    members = [entry for entry in archive.infolist() if not entry.is_dir() and not entry.filename.startswith("__MACOSX")]
    # A readme or a licence beside the one file of data does no harm.
    members = [entry for entry in members if entry.filename.endswith((".jsonl", ".tsv"))] or members
    if len(members) != 1:
        raise DataError(f"{path} holds {len(members)} files of data; exactly one is needed")
    member = members[0]
    if member.flag_bits & _ZIP_ENCRYPTED:
        raise DataError(f"{path}: {member.filename} is encrypted; unpack it and pack it again without a password")
    if member.compress_type not in _ZIP_METHODS:
        raise DataError(
            f"{path}: {member.filename} is packed by method {member.compress_type}, only 8 (deflate) is read; "
            "pack it again with `zip`, or as .gz, .zst, .bz2 or .xz"
        )
    return member
