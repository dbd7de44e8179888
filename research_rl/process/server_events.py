"""The data of a stream of server-sent events. Knows bytes and lines; knows no event of ours. Standard library only."""

from __future__ import annotations

from collections.abc import AsyncIterator

__all__ = ["data_of"]

_END = "[DONE]"


async def data_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the data of each event, one line each, up to `[DONE]` or the end of the stream; names and comments are passed over."""
    rest = b""
    async for chunk in chunks:
        # Line feeds alone end a line: what else `str.splitlines` takes for an end may stand inside a JSON text.
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = _data(line)
            if data == _END:
                return
            if data:
                yield data
    if (data := _data(rest)) and data != _END:
        yield data


def _data(line: bytes) -> str:
    """Return what follows `data:`; "" for any other line."""
    return line.removeprefix(b"data:").decode("utf-8", errors="replace").strip() if line.startswith(b"data:") else ""
