"""The main function of our fork server, which goes on where the system lets it start no process.

    this process ── descriptors ──> fork server ── fork ──> worker
          └ <── pid of the worker, or the negative number of the error ──┘

That of `multiprocessing` ends with the error. The parent learns of its workers' ends from the server alone, so it would
lose all of them for one that could not be started.

`main` passes over one error of the system, `ConnectionAbortedError`, and waits for the next process to start. So what
fails here is raised as that.

The server imports this, and so does `starting`, which shares with it how functions of the standard library are changed.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from multiprocessing import forkserver, reduction
from types import FunctionType, ModuleType
from typing import Any


class Instead:
    """A module with some names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_names(function: Any, **names: Any) -> Any:
    """Return a function of the standard library that sees some global names replaced."""
    assert not function.__code__.co_freevars, f"{function} needs more than its globals"
    globals_ = {**function.__globals__, **names}
    changed = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


_received: list[int] = []  # the descriptors of the process that is to be started


def _receive(client: socket.socket, most: int) -> list[int]:
    """Receive the descriptors of the process that is to be started.

    Raises:
        ConnectionAbortedError: the parent has not sent them, as it had not enough to make them all.
    """
    try:
        _received[:] = reduction.recvfds(client, most)
    except EOFError as error:
        raise ConnectionAbortedError(errno.ECONNABORTED, "no descriptors came") from error
    return list(_received)


def _fork() -> int:
    """Fork; where that fails, tell the parent why.

    Raises:
        ConnectionAbortedError: it failed.
    """
    try:
        return os.fork()
    except OSError as error:
        _, told, *_ = _received
        with suppress(OSError):  # the parent is gone
            forkserver.write_signed(told, -(error.errno or errno.EAGAIN))
        for descriptor in _received:
            os.close(descriptor)
        raise ConnectionAbortedError(errno.ECONNABORTED, "the process could not be forked") from error


main = with_names(
    forkserver.main,
    os=Instead(os, fork=_fork),
    reduction=Instead(reduction, recvfds=_receive),
)
