"""Workers are to end with this process, however it ends: what starts the program that sees to it, and tells it of them.

    begin(user) ──> orphan_watch.py, a child of this process       end(user) of the last one ──> it is ended
    watch(pid)  ──> a line to it

There is one for all executors of a process, while there is one that has workers. Where it cannot be started, workers
still look after themselves: see `worker.watch_parent`.
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
from forgepar.forking import close_alone, fork_safe, hold_alone, in_child, no_forks

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a program may have SIGPIPE end it


class _Watcher:
    """The program, and the socket to it."""

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())
        self.forget()

    def forget(self) -> None:
        """Have nothing, as in a forked child: it is the parent's."""
        self._users: set[int] = set()
        self._pid = self._descriptor = 0

    def begin(self, user: object) -> None:
        with no_forks, self._lock:
            if not self._users and not self._pid:
                # Of processes or descriptors there are no more, or the program ends, when Python starts nothing more.
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
            with suppress(ChildProcessError):  # the caller collects all of its children
                os.waitpid(pid, 0)

    def tell(self, pid: int) -> None:
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
begin, end, watch = _watcher.begin, _watcher.end, _watcher.tell
in_child(_watcher.forget)
