"""The process backends that are open: they are closed before the next one opens, or when the program ends.

open  ──> register          drop, when an executor is garbage collected ──> close_dropped, when the next one opens
close ──> unregister        the end of the program ──> all are closed
"""

from __future__ import annotations

import sys
from collections import deque
from contextlib import suppress
from typing import Protocol

from forgepar.backends.exit_hooks import at_exit, keep_interrupt_status
from forgepar.system.forking import in_child


class OpenBackend(Protocol):
    """What this module needs of a backend."""

    def close(self) -> None:
        """End all workers."""

    def give_up(self) -> None:
        """Make the thread that waits for tasks fail soon."""

    def leave_to_parent(self) -> None:
        """In a forked child, close copies of the parent's descriptors."""


_open: set[OpenBackend] = set()
_dropped: deque[OpenBackend] = deque()  # still open, but their executor was garbage collected
register, unregister = _open.add, _open.discard


def drop(backend: OpenBackend) -> None:
    """Have a backend closed before the next one opens, or when the program ends; garbage collection calls this.

    It is not closed now: the thread that collects garbage may hold what closing needs.
    """
    if backend in _open:
        _dropped.append(backend)


def close_dropped() -> None:
    """Close the backends of executors that were garbage collected."""
    for backend in tuple(_dropped):
        if backend in _open:
            backend.close()
        with suppress(ValueError):  # removed by another thread; not before it is closed, as an interrupt may end that
            _dropped.remove(backend)


def _close_all() -> None:
    """Close all open backends when the program ends; runs in other threads end first."""
    for backend in list(_open):
        while backend in _open:
            try:
                backend.close()
                unregister(backend)
            except KeyboardInterrupt:
                backend.give_up()
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        keep_interrupt_status()


def _leave_all_to_parent() -> None:
    for backend in list(_open):
        backend.leave_to_parent()


at_exit(_close_all)
in_child(_leave_all_to_parent)
