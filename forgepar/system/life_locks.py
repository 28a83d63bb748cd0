"""Locked files that show whether their owner is alive: a run, as the owner of its folders and of its row in a store.

    owner:   hold(path) ───────────── alive ─────────────> release(path), or its exit, for whatever reason
    others:  is_held(path)?    locking_abandoned(path): may the things that it stands for be removed?

A pid means nothing to a process in another container, or on another machine that shares the file system. The kernel
drops a file lock when its owner exits; forked children close their copies. If locks do not work, or if this process may
not see them because another kernel made the file, every owner counts as alive.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from forgepar.machine import kernel_id
from forgepar.system.forking import close_alone, hold_alone, no_forks

try:
    import fcntl
except ImportError:  # without locks, every owner counts as alive
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_MOST_BYTES = 256  # of a kernel id
NO_LOCK = ""  # content of a file that its owner could not lock
_FLAGS = getattr(os, "O_NOFOLLOW", 0)
_held: dict[str, tuple[int, int]] = {}  # by path: pid of the holder, descriptor


def hold(path: str) -> bool:
    """Create a file and lock it until `release`, or until this process exits.

    Returns:
        False if another process took the file for an abandoned one and removed it.

    Raises:
        OSError: it cannot be created.
    """
    with no_forks:  # a forked child would hold the lock as well
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        try:
            works = _lock(descriptor, is_shared=False, waits=True)
            if not is_same(descriptor, path):
                os.close(descriptor)
                return False
            if works:
                os.pwrite(descriptor, kernel_id().encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        _held[path] = (os.getpid(), hold_alone(descriptor))
    return True


def release(path: str) -> None:
    """Unlock a file, if this process itself holds it."""
    if is_own(path):
        close_alone(_held.pop(path)[1])


def is_own(path: str) -> bool:
    """Return whether this process itself holds a file, not the process that it was forked from."""
    return path in _held and _held[path][0] == os.getpid()


def is_held(path: str) -> bool | None:
    """Return whether the owner of a file is alive, or cannot be seen from here; None if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    except OSError:
        return True
    try:
        return not _is_abandoned(descriptor, is_shared=True)
    finally:
        os.close(descriptor)


def kernel_of(path: str) -> str | None:
    """Return the `kernel_id` in a file; `NO_LOCK` if its owner could not lock it, None if there is no such file."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(_MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        return NO_LOCK


@contextmanager
def locking_abandoned(path: str) -> Iterator[bool]:
    """Lock an abandoned file for the duration of the block; yield whether it was abandoned and is locked."""
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        yield False
        return
    try:
        yield _is_abandoned(descriptor, is_shared=False) and is_same(descriptor, path)
    finally:
        os.close(descriptor)


def is_same(descriptor: int, path: str) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _is_abandoned(descriptor: int, *, is_shared: bool) -> bool:
    if not _lock(descriptor, is_shared=is_shared, waits=False):
        return False
    return os.pread(descriptor, _MOST_BYTES, 0) == kernel_id().encode()


def _lock(descriptor: int, *, is_shared: bool, waits: bool) -> bool:
    """Lock a file; return whether that worked."""
    if not HAS_LOCKS:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        if waits and error.errno == errno.EINTR:
            raise
        return False
    return True
