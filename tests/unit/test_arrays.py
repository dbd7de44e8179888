"""Arrays are on the disk whole, or the writer says that they are not."""

from __future__ import annotations

import io
import resource
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from research_rl.pipeline import arrays

NUMBERS = np.arange(1600, dtype=np.float32)

WRITERS = {
    "save": "arrays.save(path, numbers)",
    "append": "with path.open('wb') as stream: arrays.append(stream, numbers)",
    "index": "dense._save(flat, path)",
}


def limited(writer: str, path: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Write 6,400 bytes of numbers where a file may have `size` bytes: to the writer it is a disk that is full."""
    code = dedent(f"""
        import faiss, numpy as np
        from pathlib import Path
        from research_rl.index import dense
        from research_rl.pipeline import arrays
        path, numbers = Path({str(path)!r}), np.arange(1600, dtype=np.float32)
        flat = faiss.IndexFlatL2(16)
        flat.add(numbers.reshape(-1, 16))
        """)

    def limits() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run([sys.executable, "-c", code + WRITERS[writer]], capture_output=True, text=True, preexec_fn=limits)


@pytest.mark.parametrize("size", [100, 3000, 5000, 6399])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_finds_no_room_is_an_error_down_to_the_last_byte(writer: str, size: int, tmp_path: Path) -> None:
    done = limited(writer, tmp_path / "numbers", size)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr, done.stderr


@pytest.mark.parametrize("writer", WRITERS)
def test_what_finds_room_is_written(writer: str, tmp_path: Path) -> None:
    done = limited(writer, tmp_path / "numbers", 7000)
    assert done.returncode == 0, done.stderr
    assert NUMBERS.tobytes() in (tmp_path / "numbers").read_bytes()


@pytest.mark.parametrize("array", [NUMBERS, NUMBERS[:0], NUMBERS.reshape(40, 40).T, NUMBERS[::3], np.array(["a", "bcd"])])
def test_the_bytes_are_those_of_numpy(array: np.ndarray, tmp_path: Path) -> None:
    arrays.save(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    written = io.BytesIO()
    arrays.append(written, array)
    assert written.getvalue() == array.tobytes()
