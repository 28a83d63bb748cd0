"""What a fork of this process does to locks and owners: the one place that has hooks for it.

    os.fork ──> waits until no worker is being started
                ├── parent: goes on
                └── child: locks that another thread held are free, descriptors that are the parent's alone are
                           closed, then every `in_child` callback runs

The child has one thread, so a lock that another thread of the parent held would stay locked in it for ever. It has
copies of all descriptors, so what the kernel drops with the parent would live on as long as the child does.
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

# Bounds the wait of a fork for a start. What a start pickles is code of the caller, which may itself wait for the
# thread that forks; a start takes some milliseconds, the first one 0.2 s.
_WAIT_SECONDS = 2.0

# Before the number of a descriptor that a spawned process holds until it ends, among what its command line has.
SENTINEL = "--forgepar-sentinel="

_Lock = TypeVar("_Lock", bound=Any)  # `threading.RLock` is no type
_Item = TypeVar("_Item")


def fork_safe(lock: _Lock) -> _Lock:
    """Have a lock be free in forked children, unless the thread that forks holds it, and return it.

    Args:
        lock: of `threading.RLock`, which knows whose it is.
    """
    _locks.add(lock)
    return lock


def holds(lock: Any) -> bool:
    """Tell whether this thread holds a lock of `threading.RLock`, as a signal handler does that comes amid it."""
    return bool(lock._is_owned())  # the standard library uses this name for the same purpose in all versions


def in_child(callback: Callable[[], object]) -> None:
    """Have a function called in each forked child, after the locks of `fork_safe` are free."""
    os.register_at_fork(after_in_child=callback)


def hold_alone(descriptor: int) -> int:
    """Have a descriptor be closed in forked children, and return it. `close_alone` closes it."""
    _alone.add(descriptor)
    return descriptor


def close_alone(descriptor: int) -> None:
    """Close a descriptor of `hold_alone`; does nothing in a forked child, which has no copy of it."""
    if descriptor in _alone:
        _alone.discard(descriptor)  # first: a child forked between the two would close what has the number by then
        os.close(descriptor)


def in_one_process(calls: Iterable[_Item]) -> Iterator[_Item]:
    """Yield what is to be called one after the other; no more in a child that one of the calls has forked."""
    process = os.getpid()
    for call in calls:
        yield call
        if os.getpid() != process:
            return


def keep_for_ever(thing: object) -> None:
    """Have an object of the parent's never be finalized in a forked child, at its end neither."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def free_all_locks() -> None:
    """Free all locks of `fork_safe`, in a child that does not go on with what its parent was doing."""
    for lock in list(_locks):
        lock._at_fork_reinit()  # the standard library uses this name for the same purpose in all versions


def import_anew() -> None:
    """In a forked child, have modules imported anew that other threads of the parent were importing.

    Each is locked by its thread, which the child does not have, and is there in part only: an import of it would wait
    for ever. Python frees the lock of the import system itself alone.
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
no_forks = fork_safe(threading.RLock())  # while a thread holds it, forks in other threads wait


class _Waited(threading.local):
    """What a thread that forks has to do behind that: to free `no_forks`, or nothing."""

    go_on: Callable[[], object] = int


_waited = _Waited()
# No line of Python, at which an interrupt could come: what hooks raise is dropped, and the lock would stay.
_go_on = functools.partial(operator.methodcaller("go_on"), _waited)


def _wait() -> None:
    _waited.go_on = int
    if no_forks.acquire(timeout=_WAIT_SECONDS):
        _waited.go_on = no_forks.release


def _go_on_in_child() -> None:
    for lock in list(_locks):
        if not lock._is_owned():
            lock._at_fork_reinit()
    while _alone:
        with suppress(OSError):
            os.close(_alone.pop())
    _go_on()


os.register_at_fork(before=_wait, after_in_parent=_go_on, after_in_child=_go_on_in_child)
