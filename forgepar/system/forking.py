"""Hooks for forks of this process: what a child does to locks and descriptors. No other module has such hooks.

    os.fork ──> wait until no worker is being started
                ├── parent: continue
                └── child: free the locks that other threads held, close the descriptors that belong to the parent
                           alone, then call every `in_child` callback

The child has one thread, so a lock that another thread of the parent held would stay locked in it. The child has copies
of all descriptors, so a file lock, which the kernel drops when its owner exits, would last as long as the child.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

# Maximum wait of a fork for the start of a worker. A start runs code of the caller while it pickles, which may itself
# wait for the thread that forks. A start takes some milliseconds, the first one 0.2 s.
_WAIT_SECONDS = 2.0

# Command line option of a spawned process, followed by the number of a descriptor that it holds until it exits.
SENTINEL = "--forgepar-sentinel="

_Lock = TypeVar("_Lock", bound=Any)  # `threading.RLock` is a function
_Item = TypeVar("_Item")


def fork_safe(lock: _Lock) -> _Lock:
    """Free a lock in forked children, unless the thread that forks holds it; return the lock.

    Args:
        lock: a `threading.RLock`, which knows its owner.
    """
    _locks.add(lock)
    return lock


def holds(lock: Any) -> bool:
    """Return whether this thread holds a `threading.RLock`, as a signal handler that interrupts it does."""
    return bool(lock._is_owned())  # private, but the standard library uses it in all versions


def in_child(callback: Callable[[], object]) -> None:
    """Call a function in each forked child, after the locks of `fork_safe` are free."""
    os.register_at_fork(after_in_child=callback)


def hold_alone(descriptor: int) -> int:
    """Close a descriptor in forked children; return it. `close_alone` closes it."""
    _alone.add(descriptor)
    return descriptor


def close_alone(descriptor: int) -> None:
    """Close a descriptor of `hold_alone`; do nothing in a forked child, which has no copy of it."""
    if descriptor in _alone:
        _alone.discard(descriptor)  # first: a child forked in between would close another file with this number
        os.close(descriptor)


def in_one_process(calls: Iterable[_Item]) -> Iterator[_Item]:
    """Yield items to be called in turn; stop in a child that one of the calls has forked."""
    process = os.getpid()
    for call in calls:
        yield call
        if os.getpid() != process:
            return


def never_finalize(thing: object) -> None:
    """Never finalize an object of the parent in a forked child, not even at exit."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def free_all_locks() -> None:
    """Free all locks of `fork_safe`, in a child that does not continue the parent's work."""
    for lock in list(_locks):
        lock._at_fork_reinit()  # private, but the standard library uses it in all versions


def import_again() -> None:
    """In a forked child, have modules imported again that other threads of the parent were importing.

    Such a module is incomplete, and locked by a thread that the child does not have: importing it would wait forever.
    Python itself frees only the lock of the import system.
    """
    here, modules = threading.get_ident(), sys.modules
    locks: dict[str, Any] = getattr(modules["_frozen_importlib"], "_module_locks", {})
    for name, refer in list(locks.items()):
        owner = getattr(refer(), "owner", None)
        if owner not in (None, here):
            locks.pop(name, None)
            if getattr(getattr(modules.get(name), "__spec__", None), "_initializing", False):
                del modules[name]


_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_alone: set[int] = set()
no_forks = fork_safe(threading.RLock())  # forks in other threads wait while a thread holds it


class _ForkingThread(threading.local):
    """What a thread does after it has forked: release `no_forks`, or nothing."""

    after_fork: Callable[[], object] = int


_forking = _ForkingThread()
# No Python code, which an interrupt could stop: Python drops exceptions of hooks, and the lock would stay held.
_after_fork = functools.partial(operator.methodcaller("after_fork"), _forking)


def _before_fork() -> None:
    _forking.after_fork = int
    if no_forks.acquire(timeout=_WAIT_SECONDS):
        _forking.after_fork = no_forks.release


def _after_fork_in_child() -> None:
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()
    while _alone:
        with suppress(OSError):
            os.close(_alone.pop())
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
