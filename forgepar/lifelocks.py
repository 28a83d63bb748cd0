"""Locked files that tell whether their owner lives: a run, of its folders and of its row in a store.

    owner:   hold(path) ───────────── lives ─────────────> let_go(path), or its end, however it comes
    others:  is_held(path)?    taking(path): may what it stands for be removed?

A pid says nothing to a process in another container, or on another machine that shares the file system. The kernel
drops a lock with its owner alone: forked children close their copy of it. Where locks do not work, and where they may
not be seen by others (another kernel made the file), every owner counts as living.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from forgepar.forking import close_alone, hold_alone, no_forks
from forgepar.machine import kernel_id

try:
    import fcntl
except ImportError:  # no locks: everybody counts as living
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_MOST_BYTES = 256  # of a kernel's id
NO_LOCK = ""  # in a file that its owner could not lock
_FLAGS = getattr(os, "O_NOFOLLOW", 0)
_held: dict[str, tuple[int, int]] = {}  # by path, the process that holds it and its descriptor


def hold(path: str) -> bool:
    """Make a file and lock it until `let_go`, or the end of this process.

    Returns:
        False if another process took the file for one that was left and has removed it.

    Raises:
        OSError: it cannot be made.
    """
    with no_forks:  # a child would hold the lock as well
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


def let_go(path: str) -> None:
    """Unlock a file, if this very process holds it."""
    if is_own(path):
        close_alone(_held.pop(path)[1])


def is_own(path: str) -> bool:
    """Tell whether this very process holds a file, not the one that it was forked from."""
    return path in _held and _held[path][0] == os.getpid()


def is_held(path: str) -> bool | None:
    """Tell whether the owner of a file lives, or cannot be seen from here; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    except OSError:
        return True
    try:
        return not _is_left(descriptor, is_shared=True)
    finally:
        os.close(descriptor)


def kernel_of(path: str) -> str | None:
    """Return the `kernel_id` of whoever made a file; `NO_LOCK` if it could not lock it; None if there is none."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(_MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        return NO_LOCK


@contextmanager
def taking(path: str) -> Iterator[bool]:
    """Lock what an owner left for the time of the block; yield whether it was left and is locked now."""
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        yield False
        return
    try:
        yield _is_left(descriptor, is_shared=False) and is_same(descriptor, path)
    finally:
        os.close(descriptor)


def is_same(descriptor: int, path: str) -> bool:
    """Tell whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _is_left(descriptor: int, *, is_shared: bool) -> bool:
    if not _lock(descriptor, is_shared=is_shared, waits=False):
        return False
    return os.pread(descriptor, _MOST_BYTES, 0) == kernel_id().encode()


def _lock(descriptor: int, *, is_shared: bool, waits: bool) -> bool:
    """Lock a file; tell whether that worked."""
    if not HAS_LOCKS:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        if waits and error.errno == errno.EINTR:
            raise
        return False
    return True
