"""A small program that ends workers when their parent is gone: `python -I -S orphan_watch.py PARENT SOCKET`.

    parent ── pids of its workers, one per line ──> this program ── once the parent is gone ──> SIGKILL, whole trees

Workers also watch their parent themselves, with a thread and a pipe. But a worker that is stopped, or runs C code that
holds the GIL, notices nothing, and the pipe stays open while any process lives that C code of the parent has forked.
This program asks the kernel about the parent's process. It starts in a few milliseconds, because it imports only
built-in modules, and nothing of forgepar.
"""

from __future__ import annotations

import os
import select
import sys

_POLL_MILLISECONDS = 250  # between two checks of the parent, if the system cannot report its end
_ALONE_MILLISECONDS = 1000  # between two checks of the workers of a program that has replaced the parent
_MOST_ROUNDS = 10  # of searching for processes that have started meanwhile
_MANY = 64  # pids after which those of ended processes are dropped


def main(parent: int, control: int) -> None:
    """Wait for the end of the parent, then end its workers."""
    os.setsid()  # signals to the processes of a terminal or of a group must not reach this one
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    pids: dict[int, str] = {}
    if _outlive(parent, control, pids):
        _end(pids)


def _outlive(parent: int, control: int, pids: dict[int, str]) -> bool:
    """Receive pids until the parent is gone; return False if all these processes have ended before it."""
    poller, life = select.poll(), _descriptor_of(parent)
    poller.register(control, select.POLLIN)
    if life is not None:
        poller.register(life, select.POLLIN)
    rest, is_open = b"", True
    while True:
        is_gone = os.getppid() != parent  # read this before the rest of the pids
        patience = None if life is not None else _POLL_MILLISECONDS
        events = poller.poll(0 if is_gone else patience if is_open else _ALONE_MILLISECONDS)
        if is_open and any(number == control for number, _ in events):
            data = os.read(control, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            pids.update((int(line), start_of(int(line))) for line in lines)
            if len(pids) > _MANY:
                _forget_ended(pids)
            if not data:
                is_open = False
                poller.unregister(control)
        elif is_gone or any(number == life for number, _ in events):
            return True
        elif not is_open:
            _forget_ended(pids)
            if not pids:
                return False


def _descriptor_of(pid: int) -> int | None:
    """Open a descriptor that becomes readable when a process ends; None if the system has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _forget_ended(pids: dict[int, str]) -> None:
    for pid, started in list(pids.items()):
        if start_of(pid) != started or not _runs(pid):
            del pids[pid]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return _stat_of(pid)[:1] not in (["Z"], ["X"])


def start_of(pid: int) -> str:
    """Return when a process started, in the kernel's unit; empty if unknown."""
    fields = _stat_of(pid)
    return fields[19] if fields else ""


def _stat_of(pid: int) -> list[str]:
    """Return the fields of a process's stat file, from its state on; empty if there is none."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _end(pids: dict[int, str]) -> None:
    """Kill processes and their descendants; stop them first, so that they start no more."""
    from signal import SIGKILL, SIGSTOP

    found: set[int] = set()
    for _ in range(_MOST_ROUNDS):
        new = _trees(pids) - found
        for pid in new:
            _send(pid, SIGSTOP)
        found |= new
        if not new:
            break
    for pid in found:
        _send(pid, SIGKILL)


def _trees(pids: dict[int, str]) -> set[int]:
    """Return those processes that still run, and all descendants."""
    children: dict[int, list[int]] = {}
    try:
        running = [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208
    except OSError:  # this system does not show the parents of processes
        running = []
    for pid in running:
        fields = _stat_of(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    waiting = [pid for pid, started in pids.items() if start_of(pid) == started and _runs(pid)]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, ())
    return found


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
