"""Run one command and take every descendant along when the parent or the command ends. Standard library only.

Started by `research_rl.process.services` as `python -I -S _guardian.py COMMAND...` with a pipe as standard input that the
parent never writes to: end of file on it means that the parent is gone, however it died. As child subreaper this
process inherits daemons that the command left behind, so that none of them outlives it.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
# The command's own environment must not have it: a guardian that the command starts has a grace period of its own.
GRACE_S = float(os.environ.pop("RESEARCH_GRACE_S", "10"))


def descendants(root: int) -> list[int]:
    """Return the pids of all living processes below `root`."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as stream:
                # The second field is the name in parentheses and may hold spaces and parentheses itself.
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[0] != b"Z":
            children.setdefault(int(fields[1]), []).append(int(name))
    pids: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        pids += below
        queue += below
    return pids


def signal_all(number: int) -> None:
    """Send a signal to every descendant."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap() -> dict[int, int]:
    """Collect ended children; return a dict pid -> exit code."""
    codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


def childless() -> bool:
    """Reap, and return whether nothing is left below this process."""
    reap()
    # Asked of the kernel, not of /proc: orphans become children of a subreaper, so without a child there is no descendant. A reading
    # of /proc is not one moment: where a child's pid is below its parent's, both are missed when the parent ends between the two.
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def end_all() -> None:
    """Ask, wait, then kill, until no descendant is left."""
    signal_all(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while not childless():
        if time.monotonic() > deadline:
            # At every turn: a process that was forked during the last reading of /proc has had no signal.
            signal_all(signal.SIGKILL)
        time.sleep(0.02)


def main(command: list[str]) -> int:
    """Run `command` to its end or until the parent is gone or a signal comes; return its exit code."""
    # Before the command starts: orphans go to whoever is the subreaper when their parent ends.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Python goes on with an interrupted `select` by itself; a byte in this pipe makes it return.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    stop: list[object] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stop.append(number))
    # A signal without a handler writes no byte into that pipe.
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    # End of file on the owner's pipe is for the guardian; the command must not read it as its own input.
    null = os.open(os.devnull, os.O_RDONLY)
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 0)], setsigdef=[signal.SIGCHLD])
    code: int | None = None
    while code is None and not stop:
        ready, _, _ = select.select([0, wake_read], [], [])
        if 0 in ready:
            stop.append("parent is gone")
        elif wake_read in ready:
            os.read(wake_read, 4096)
        code = reap().get(child)
    end_all()
    # As a shell reports it: 128 + the signal that ended the command; 143 (SIGTERM) when it was this process that ended it.
    return 128 - code if code is not None and code < 0 else code if code is not None else 143


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
