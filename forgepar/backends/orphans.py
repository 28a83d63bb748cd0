"""The program that ends workers when this process has ended, however it ends: its start, and what it is sent.

    begin(user) ──> orphan_watch.py starts, a child of this process       end(user) of the last user ──> it is killed
    watch(pid)  ──> it receives one line

All executors of a process share one program, which runs while any of them has workers. If it cannot be started, workers
still watch their parent themselves: see `worker_process.watch_parent`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from multiprocessing import spawn, util

from forgepar.backends import orphan_watch
from forgepar.system.forking import close_alone, fork_safe, hold_alone, in_child, no_forks

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program may let SIGPIPE end it


class _Watcher:
    """The running program, and the socket to it."""

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())
        self.forget()

    def forget(self) -> None:
        """Forget the program, which in a forked child is the parent's."""
        self._users: set[int] = set()
        self._pid = self._descriptor = 0

    def begin(self, user: object) -> None:
        with no_forks, self._lock:
            if not self._users and not self._pid:
                # There may be no more processes or descriptors, and at its end Python starts nothing more.
                with suppress(OSError, RuntimeError):
                    self._start()
            self._users.add(id(user))

    def end(self, user: object) -> None:
        with self._lock:
            self._users.discard(id(user))
            if self._users or not self._pid:
                return
            pid, descriptor = self._pid, self._descriptor
            self._pid = self._descriptor = 0
            close_alone(descriptor)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # the caller waits for all of its children
                os.waitpid(pid, 0)

    def send(self, pid: int) -> None:
        with self._lock:
            if not self._pid:
                return
            with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as control:
                control.send(b"%d\n" % pid, _NO_SIGNAL)

    def _start(self) -> None:
        program = orphan_watch.__file__
        if getattr(sys, "frozen", False) or not os.path.isfile(program):  # noqa: PTH113
            return
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            path = os.fsencode(spawn.get_executable())
            command = [path, b"-I", b"-S", program, str(os.getpid()), str(theirs.fileno())]
            try:
                self._pid = util.spawnv_passfds(path, command, [theirs.fileno()])  # type: ignore[arg-type]
            except BaseException:
                ours.close()
                raise
            self._descriptor = hold_alone(ours.detach())


_watcher = _Watcher()
begin, end, watch = _watcher.begin, _watcher.end, _watcher.send
in_child(_watcher.forget)
