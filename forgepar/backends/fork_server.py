"""The main function of forgepar's fork server, which continues when the system does not let it start a process.

    this process ── descriptors ──> fork server ── fork ──> worker
          └ <── pid of the worker, or the negative errno ──┘

The fork server of `multiprocessing` ends with such an error. Since the parent learns from the server alone that a
worker has ended, it would lose all workers because one could not be started.

The original `main` ignores one error, `ConnectionAbortedError`, and waits for the next process to start. So failures
are raised here as that error.

Both the server and `starting` import this module; `starting` also changes functions of the standard library.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from multiprocessing import forkserver, reduction
from types import FunctionType, ModuleType
from typing import Any


class ModuleProxy:
    """A module with some names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_globals(function: Any, **names: Any) -> Any:
    """Return a copy of a function of the standard library with some of its global names replaced."""
    assert not function.__code__.co_freevars, f"{function} is a closure"
    globals_ = {**function.__globals__, **names}
    changed = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


_received: list[int] = []  # descriptors of the process that is to be started


def _receive(client: socket.socket, most: int) -> list[int]:
    """Receive the descriptors of the process that is to be started.

    Raises:
        ConnectionAbortedError: the parent has sent none, because it could not create all of them.
    """
    try:
        _received[:] = reduction.recvfds(client, most)
    except EOFError as error:
        raise ConnectionAbortedError(errno.ECONNABORTED, "no descriptors came") from error
    return list(_received)


def _fork() -> int:
    """Fork; if that fails, send the parent the error's number.

    Raises:
        ConnectionAbortedError: the fork failed.
    """
    try:
        return os.fork()
    except OSError as error:
        _, reply_to, *_ = _received
        with suppress(OSError):  # the parent is gone
            forkserver.write_signed(reply_to, -(error.errno or errno.EAGAIN))
        for descriptor in _received:
            os.close(descriptor)
        raise ConnectionAbortedError(errno.ECONNABORTED, "the process could not be forked") from error


main = with_globals(
    forkserver.main,
    os=ModuleProxy(os, fork=_fork),
    reduction=ModuleProxy(reduction, recvfds=_receive),
)
