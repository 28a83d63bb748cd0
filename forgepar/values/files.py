"""System calls on the files of segments."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence

from forgepar.values.segment import ALIGNMENT

try:
    import fcntl
except ImportError:  # no locks: nothing is used twice
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_MOST_VECTORS = 512  # parts that one system call writes; the least that any system takes is 1024
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_PADDING = bytes(ALIGNMENT)
# Who asks for a segment to write will write all of it: to have its pages made at once costs half as much.
_SHARED_AND_FILLED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def make(path: str) -> int:
    """Open a new file that only its owner may read."""
    return _open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)


def open_to_read(path: str) -> int:
    """Open a file to read it."""
    return _open(path, os.O_RDONLY)


def _open(path: str, flags: int) -> int:
    """Open a file, letting this process have more files open if it must."""
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_descriptor_limit():
            raise
        return os.open(path, flags, 0o600)


def _raise_descriptor_limit() -> bool:
    """Let this process have as many open files as it may allow itself: each mapping holds one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] != soft


def is_unmapped(descriptor: int) -> bool:
    """Tell whether nobody else has a segment mapped; hold the lock of those who have."""
    if not HAS_LOCKS:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    lock(descriptor)  # the next who tries is to see that this one is in use
    return True


def lock(descriptor: int) -> None:
    """Share a file with others who have it mapped: a mapping holds a copy of the descriptor, and so the lock."""
    if HAS_LOCKS:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:  # where there are none, `is_unmapped` has nothing be used twice
                raise


def reserve(descriptor: int, n_bytes: int) -> None:
    """Have the pages made now, where no room is an error; at a write to a mapping it would end the process."""
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.ftruncate(descriptor, n_bytes)  # the system or the file system cannot


def write_all(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write parts, each padded to the alignment, many with one call."""
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
    """Map a file of which `reserve` had the pages made."""
    return mmap.mmap(descriptor, n_bytes, flags=_SHARED_AND_FILLED)


def map_to_read(descriptor: int) -> memoryview:
    """Map a whole file, or read it where no more mappings may be had."""
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return _read_all(descriptor)


def _read_all(descriptor: int) -> memoryview:
    with open(descriptor, "rb", closefd=False) as file:
        return memoryview(file.read())
