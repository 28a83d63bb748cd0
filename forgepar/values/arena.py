"""Segments: files in memory that hold what is too large for a message.

An arena is a folder that only its owner may open, in ``/dev/shm`` where that has room, else in the temporary folder.
Its name tells the owner's user id, pid and start time, so that a later run can sweep what a killed one left behind.
Segments are written once, mapped read-only by whoever needs them, and unlinked when nobody does; a mapping outlives
that.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

# A segment's name and the length in bytes of each part in it; flat, so that it pickles small.
Segment: TypeAlias = tuple[str | int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register numpy's kernels load
_PREFIX = "forgepar"
_MEMORY = Path("/dev/shm")  # noqa: S108  (a folder of our own, mode 0700, is made in it)
_LEAST_FREE = 1 << 30  # bytes; containers give 64 MiB, which one value could fill
_PROCESSES = Path("/proc")
_counter = itertools.count()


class Arena:
    """One folder of segments; the process that makes it removes it, others attach by its path.

    Args:
        folder: an existing arena's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prefix = str(folder) + os.sep

    @classmethod
    def create(cls) -> Arena:
        """Make an arena for this process, after sweeping those whose owners are dead."""
        for root in {_MEMORY, _temporary()}:
            _sweep(root)
        name = f"{_PREFIX}-{os.getuid()}-{os.getpid()}-{_start_time(os.getpid())}-{os.urandom(4).hex()}"
        folder = _roomy_root() / name
        folder.mkdir(mode=0o700)
        return cls(folder)

    def write(self, parts: Sequence[bytes | memoryview]) -> Segment:
        """Write a new segment, its parts each at a multiple of `ALIGNMENT`.

        Returns:
            what `read` takes.

        Raises:
            OSError: no room is left.
        """
        name = f"{os.getpid()}-{next(_counter)}"
        descriptor = os.open(self._prefix + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            for part in parts:
                _write_all(descriptor, part)
                _write_all(descriptor, bytes(-len(part) % ALIGNMENT))
        except BaseException:
            self.free(name)
            raise
        finally:
            os.close(descriptor)
        return (name, *(len(part) for part in parts))

    def read(self, segment: Segment) -> list[memoryview]:
        """Map a segment read-only and return a view of each of its parts."""
        name, *lengths = segment
        if not any(lengths):
            return [memoryview(b"") for _ in lengths]  # an empty file cannot be mapped
        descriptor = os.open(self._prefix + str(name), os.O_RDONLY)
        try:
            whole = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)
        views, start = [], 0
        for length in map(int, lengths):
            views.append(whole[start : start + length])
            start += length + -length % ALIGNMENT
        return views

    def free(self, name: str | int) -> None:
        """Unlink a segment; what is mapped stays readable."""
        with suppress(FileNotFoundError):
            os.unlink(self._prefix + str(name))  # noqa: PTH108  (this is called per value: no Path is made for it)

    def names(self) -> list[str]:
        """List the segments there are."""
        return sorted(entry.name for entry in self.folder.iterdir() if entry.name[0].isdigit())

    def remove(self) -> None:
        """Remove the folder and all in it."""
        _remove(self.folder)


def segment_bytes(segment: Segment) -> int:
    """Tell how many bytes of payload a segment has."""
    return sum(int(length) for length in segment[1:])


def _write_all(descriptor: int, part: bytes | memoryview) -> None:
    view = memoryview(part).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _roomy_root() -> Path:
    try:
        room = os.statvfs(_MEMORY)
        if room.f_bavail * room.f_frsize >= _LEAST_FREE and os.access(_MEMORY, os.W_OK):
            return _MEMORY
    except OSError:
        pass
    return _temporary()


def _temporary() -> Path:
    import tempfile

    return Path(tempfile.gettempdir())


def _remove(folder: str | Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the arenas of this user in ``root`` whose owner no longer runs."""
    arena_name = re.compile(rf"{_PREFIX}-{os.getuid()}-(\d+)-(\d+)-[0-9a-f]+")
    try:
        found = [(entry, arena_name.fullmatch(entry.name)) for entry in os.scandir(root)]
    except OSError:
        return
    for entry, match in found:
        with suppress(FileNotFoundError):  # another run may be sweeping as well
            if match and _start_time(int(match[1])) != match[2] and _is_mine(entry):
                _remove(entry.path)


def _is_mine(entry: os.DirEntry[str]) -> bool:
    return entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _start_time(pid: int) -> str:
    """Tell when a process started, in a unit that setting the clock does not change; empty if it does not run."""
    if (_PROCESSES / "self" / "stat").exists():
        try:
            fields = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] in "ZX" else fields[19]  # clock ticks from the boot to the start
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(round(process.create_time() * 1000))
    except psutil.NoSuchProcess:
        return ""
