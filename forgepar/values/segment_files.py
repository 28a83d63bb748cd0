"""System calls on segment files."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence

from forgepar.values.segments import ALIGNMENT

try:
    import fcntl
except ImportError:  # without locks no segment is reused
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_MOST_VECTORS = 512  # parts per system call; every system accepts at least 1024
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_PADDING = bytes(ALIGNMENT)
# The whole segment will be written: creating all its pages at once costs half as much as one by one.
_SHARED_AND_FILLED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def make(path: str) -> int:
    """Create and open a file that only its owner may read."""
    return _open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)


def open_to_read(path: str) -> int:
    """Open a file for reading."""
    return _open(path, os.O_RDONLY)


def _open(path: str, flags: int) -> int:
    """Open a file; raise the limit of open files if it is reached."""
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_descriptor_limit():
            raise
        return os.open(path, flags, 0o600)


def _raise_descriptor_limit() -> bool:
    """Raise this process's limit of open files to the hard limit: each mapping takes one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] != soft


def is_unmapped(descriptor: int) -> bool:
    """Return whether no other process has a segment mapped; if so, hold the shared lock on it."""
    if not HAS_LOCKS:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    lock(descriptor)  # so that other processes see that it is in use
    return True


def lock(descriptor: int) -> None:
    """Take the shared lock on a file; a mapping duplicates the descriptor and so holds the lock too."""
    if HAS_LOCKS:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:  # without locks, `is_unmapped` prevents reuse
                raise


def reserve(descriptor: int, n_bytes: int) -> None:
    """Allocate the pages now, so that lack of space raises; on a write to a mapping it would kill the process."""
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.ftruncate(descriptor, n_bytes)  # the system or the file system has no fallocate


def write_all(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write the parts, each padded to the alignment, several per system call."""
    vectors: list[bytes | memoryview] = []
    for part in parts:
        vectors += (part, _PADDING[: -len(part) % ALIGNMENT])
    while vectors:
        n_written = os.writev(descriptor, vectors[:_MOST_VECTORS])
        at = 0
        while at < len(vectors) and n_written >= len(vectors[at]):
            n_written -= len(vectors[at])
            at += 1
        vectors = vectors[at:]
        if n_written:
            vectors[0] = memoryview(vectors[0])[n_written:]


def map_to_write(descriptor: int, n_bytes: int) -> mmap.mmap:
    """Map a file that `reserve` has allocated."""
    return mmap.mmap(descriptor, n_bytes, flags=_SHARED_AND_FILLED)


def map_to_read(descriptor: int) -> memoryview:
    """Map a whole file; read it if no more mappings are allowed."""
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return _read_all(descriptor)


def _read_all(descriptor: int) -> memoryview:
    with open(descriptor, "rb", closefd=False) as file:
        return memoryview(file.read())
