"""Run a command on a cluster for as long as the process that asked for it is alive. Standard library only.

Started by Ray as `python -I -S _leased.py LEASE SECONDS LOG FOLDER COMMAND...`. The asking process rewrites the lease file, on
storage both can see, every second; when its text has not changed for SECONDS the command is ended. Output goes to LOG and to
standard output. No clock is compared with another machine's.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GUARDIAN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_guardian.py")
# EX_TEMPFAIL of sysexits.h: not a code of the command, and the same command may succeed later.
EXPIRED = 75


def read(path: str) -> str:
    """Return the lease's text, empty when it cannot be read."""
    try:
        with open(path) as stream:
            return stream.read()
    except OSError:
        return ""


def copy(source: int, log: int) -> None:
    """Copy a pipe to the log and to standard output until it ends."""
    while block := os.read(source, 65536):
        os.write(log, block)
        os.write(1, block)


def main(lease: str, seconds: float, log_path: str, folder: str, command: list[str]) -> int:
    """Run `command` in `folder`; return its exit code, 143 when told to stop, 75 when the lease expired."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    # The guardian ends everything below it when the pipe to this process closes, however this process dies.
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", GUARDIAN, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
    )
    assert child.stdout
    thread = threading.Thread(target=copy, args=(child.stdout.fileno(), log), daemon=True)
    thread.start()
    # The time of a change is when it was seen here; a time written into the lease would be another machine's.
    lease_text, changed_at, code = read(lease), time.monotonic(), None
    while (code := child.poll()) is None and not stop:
        if (current := read(lease)) != lease_text:
            lease_text, changed_at = current, time.monotonic()
        elif time.monotonic() - changed_at > seconds:
            os.write(log, f"research: no sign of life in {lease} for {seconds:g} s; the trainer is ended\n".encode())
            code = EXPIRED
            break
        time.sleep(0.2)
    if child.poll() is None:
        child.terminate()
        child.wait()
    # However it ended, the last lines of the command are still on their way through the pipe.
    thread.join(5)
    return 143 if code is None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]))
