"""Messages between two processes of this machine, with open files if need be. Knows bytes; knows no message's meaning.

Invariants: (1) a message arrives whole or not at all; (2) when the other end is closed, or its process gone however that happened,
`receive` returns None and `send` does nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Channel"]

_LONGEST = 1 << 16
_LONGEST_TEXT = 4000


class Channel:
    """One end of a pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return two ends that are joined."""
        # Of packets: a message needs no mark where it ends.
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(first), cls(second)

    @classmethod
    def of(cls, handle: int) -> Channel:
        """Return the end that came as an open file with a message."""
        return cls(socket.socket(fileno=handle))

    def fileno(self) -> int:
        """Return the open file, for `select`."""
        return self._end.fileno()

    def send(self, handles: Sequence[int] = (), **message: Any) -> None:
        """Send a message with open files, of which the other process gets copies; texts are cut to 4,000 characters."""
        cut = {name: value[:_LONGEST_TEXT] if isinstance(value, str) else value for name, value in message.items()}
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._end, [json.dumps(cut).encode()], list(handles))

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Wait for the next message and the open files that came with it; None once the other end is closed."""
        try:
            data, handles, _, _ = socket.recv_fds(self._end, _LONGEST, 4)
        except ConnectionResetError:
            return None
        if not data:
            return None
        for handle in handles:
            # As Python opens files: a program that this process starts gets none of them.
            os.set_inheritable(handle, False)
        return json.loads(data), handles

    def close(self) -> None:
        """Close this end."""
        self._end.close()
