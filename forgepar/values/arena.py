"""Segments: files in shared memory through which large values go from process to process without a copy.

    write, grant ──> segment ──> read (mapped, any number of times) ──> free ──> free list ──> write, grant
                        │                                                 └──> unlinked: small, or the list is full
                        └──> on disk, if the memory budget is used up or shared memory is full

A segment is written once, mapped read-only by its readers, and freed when no task needs its value any more. Large
segments are then kept for the next value of their size class: existing pages are written three times as fast as new
ones. A process that maps a large segment holds a shared lock on it, and a segment that is still mapped is not written
to again. The kernel drops the lock with the mapping, also when the process dies.

Any process may do any of this at any time: one rename claims a freed segment. A usage meter, also in shared memory,
counts the bytes in use; each process writes one column of it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from forgepar.errors import ArenaFull, WrongProcess, add_note, report
from forgepar.values import segment_files as files
from forgepar.values.segments import ALIGNMENT, LEAST_KEPT, Segment, maker_of, name_of, names_of, size_class, size_of
from forgepar.values.usage_meter import MeterRow, UsageMeter

if TYPE_CHECKING:
    from pathlib import Path

NO_BUDGET = (1 << 63) - 1
METER, IDLE = "meter", "idle"  # the meter's file, and the folder of segments kept for later values
# How long to wait for an idle segment that is still mapped: workers unmap within 0.2 ms of being asked, and a new
# segment costs ten times as much as this wait.
_WAIT_SECONDS_PER_BYTE = 2e-11
_WAIT_STEP_SECONDS = 1e-4
_ATTEMPTS = 3  # to make a file in a folder that may be removed at any time
_MOST_MAPPED = 64  # segments that a worker keeps mapped for later tasks
_counter = itertools.count()


class ArenaLocation(NamedTuple):
    """Folders and limits of an arena, as they are sent to workers.

    Attributes:
        folder: folder of segments in memory, and of the meter.
        spill_folder: folder of segments on disk.
        budget: maximum bytes in memory, including those kept for later values.
        n_columns: number of processes that have a column in the meter.
    """

    folder: str
    spill_folder: str
    budget: int
    n_columns: int


class ArenaUsage(NamedTuple):
    """Content and totals of an arena, in bytes of whole size classes except for the count.

    Attributes:
        n_segments: number of segments that have a value.
        in_use: bytes of segments in memory that have a value.
        idle: bytes of segments in memory that are kept for later values.
        peak: maximum bytes that were in memory, in use or idle.
        spilled: bytes that were written to disk in all.
        reused: bytes that were written to reused segments in all.
    """

    n_segments: int
    in_use: int
    idle: int
    peak: int
    spilled: int
    reused: int


class _Grant(NamedTuple):
    """A segment that a task fills in place: its name, its address, its length, and the mapping."""

    name: str
    address: int
    n_bytes: int
    mapping: weakref.ref[mmap.mmap]


class Arena:
    """View of an arena in one process.

    Args:
        place: folders and limits; a folder alone stands for an arena without budget.
        column: the column of the meter that this process writes.
        keeps_mapped: whether large segments stay mapped until `drop`.
    """

    blob_limit = 32 * 1024  # bytes of pickle; below it a copy is cheaper than a segment's open, map and unlink

    def __init__(self, place: ArenaLocation | str | Path, column: int = 0, *, keeps_mapped: bool = False) -> None:
        if not isinstance(place, ArenaLocation):
            place = ArenaLocation(str(place), str(place), NO_BUDGET, 1)
        self.place = place
        self._folders = {"m": place.folder + os.sep, "d": place.spill_folder + os.sep}
        self._idle_folder = place.folder + os.sep + IDLE + os.sep
        self._has_idle_folder = os.path.isdir(self._idle_folder)  # noqa: PTH112
        self._meter = UsageMeter(place.folder + os.sep + METER, place.n_columns, column)
        self._keeps_mapped = keeps_mapped
        self._owner = os.getpid()
        self._mapped: OrderedDict[str, memoryview] = OrderedDict()
        self._grants: list[_Grant] = []
        self._is_removal_reported = False

    @property
    def folder(self) -> Path:
        """Folder in shared memory."""
        from pathlib import Path  # a worker need not load it

        return Path(self.place.folder)

    # Writing

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Write a new segment, each part at a multiple of `ALIGNMENT`.

        Args:
            parts: bytes to write, or the (name, offset, length) of a part that lies in another segment.

        Returns:
            The segment, for `read` and `free`.

        Raises:
            ArenaFull: neither memory nor disk has room.
        """
        own = [part for part in parts if not isinstance(part, tuple)]
        n_bytes = sum(len(part) + -len(part) % ALIGNMENT for part in own)
        name = self._write(own, n_bytes)
        return (name, *(part if type(part) is tuple else len(part) for part in parts))

    def grant(self, n_bytes: int) -> mmap.mmap:
        """Map a new segment for writing; its content is undefined.

        The arena keeps track of it until its content is part of a value (`granted`, `give`), or until its mapping is
        deleted (`take_back`).

        Raises:
            ArenaFull: neither memory nor disk has room.
        """
        name, descriptor = self._take(n_bytes, files.reserve)
        try:
            files.lock(descriptor)
            mapping = files.map_to_write(descriptor, n_bytes)
            self._grants.append(_Grant(name, _address(mapping), n_bytes, weakref.ref(mapping)))
        except BaseException:
            self.free((name,), keep=False)
            raise
        finally:
            os.close(descriptor)
        return mapping

    def granted(self, buffer: memoryview) -> tuple[str, int, int] | None:
        """Return (name, offset, length) of a buffer that lies in a granted segment, else None."""
        if not self._grants or not len(buffer):
            return None
        address = _address(buffer)
        for grant in self._grants:
            offset = address - grant.address
            if offset >= 0 and offset + len(buffer) <= grant.n_bytes and grant.mapping() is not None:
                return grant.name, offset, len(buffer)
        return None

    def give(self, segment: Segment) -> None:
        """Stop tracking the granted segments that this segment refers to: they belong to its value now."""
        if self._grants:
            given = names_of(segment)[1:]
            self._grants = [grant for grant in self._grants if grant.name not in given]

    def take_back(self) -> None:
        """Free the granted segments that no object refers to any more."""
        for grant in [grant for grant in self._grants if grant.mapping() is None]:
            self._grants.remove(grant)
            self.free((grant.name,))

    def _write(self, parts: Sequence[bytes | memoryview], n_bytes: int) -> str:
        name, descriptor = self._take(n_bytes, lambda opened, _: files.write_all(opened, parts))
        os.close(descriptor)
        return name

    def _take(self, n_bytes: int, fill: Callable[[int, int], None]) -> tuple[str, int]:
        """Open a segment of this size, reused, new or on disk, and fill it."""
        if os.getpid() != self._owner:  # parent and child would count in the same column of the meter
            raise WrongProcess.here(self._owner)
        size = size_class(n_bytes)
        for name, descriptor in self._candidates(size):
            try:
                fill(descriptor, n_bytes)
            except BaseException as error:
                os.close(descriptor)
                self.free((name,), keep=False)
                if name[0] == "m" and isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    continue
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ArenaFull(
                        f"no room for a value of {n_bytes} bytes: the budget of {self.place.budget} bytes in "
                        f"{self.place.folder} is used up or its file system is full, and {self.place.spill_folder} is "
                        f"full ({error}). Give a larger memory_budget=, keep fewer outputs, or set TMPDIR to a folder "
                        "on a larger disk."
                    ) from error
                add_note(error, f"Raised while writing a value of {n_bytes} bytes to {self._folders[name[0]]}.")
                raise
            return name, descriptor
        raise AssertionError("the last candidate is on disk, and its failure was raised")

    def _candidates(self, size: int) -> Iterator[tuple[str, int]]:
        """Yield opened segments to try, the best first. The caller frees those that it does not use."""
        if size >= LEAST_KEPT and (kept := self._reuse(size)) is not None:
            yield kept
        if (made := self._make_in_memory(size)) is not None:
            yield made
        if self._evict() and (made := self._make_in_memory(size)) is not None:
            yield made
        yield self._make_on_disk(size)

    def _make_in_memory(self, size: int) -> tuple[str, int] | None:
        """Open a new segment in memory; None if the budget has no room, or the folder was removed."""
        if not self._count_new(size):
            return None
        try:
            return self._make("mn", size)
        except FileNotFoundError:
            if not self._is_removal_reported:
                self._is_removal_reported = True
                report(
                    f"{self.place.folder}, the folder of values in shared memory, was removed by another program. "
                    "systemd-logind does that when a user logs out (RemoveIPC=). Values now go through files in "
                    f"{self.place.spill_folder}, which is slower; values that were only in the folder are lost.",
                    logger="forgepar.run",
                )
            return None

    def _make_on_disk(self, size: int) -> tuple[str, int]:
        """Open a new segment in the temporary folder; make the folder again if it was removed."""
        for _ in range(_ATTEMPTS):
            try:
                return self._make("dn", size)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another process made it first
                    os.mkdir(self.place.spill_folder, 0o700)  # noqa: PTH102  (a worker need not load pathlib)
        return self._make("dn", size)

    def _make(self, kind: str, size: int) -> tuple[str, int]:
        name = name_of(kind, size, os.getpid(), next(_counter))
        try:
            descriptor = files.make(self._folders[kind[0]] + name)
        except OSError as error:
            if kind[0] == "m":
                self._meter.add(MeterRow.MADE, -size)
            add_note(error, f"Raised while creating a file for a large value in {self._folders[kind[0]]}.")
            raise
        if kind[0] == "m":
            self._meter.see_peak(self.place.budget)
        else:
            self._meter.add(MeterRow.SPILLED, size)
        return name, descriptor

    def _reuse(self, size: int) -> tuple[str, int] | None:
        """Claim an idle segment of this size that no process has mapped."""
        until = time.perf_counter() + size * _WAIT_SECONDS_PER_BYTE
        while self._meter.idle:
            candidates = [found for found in self._idle_names() if found.startswith(f"{size:x}-")]
            for found in candidates:
                if (claimed := self._claim(found, size)) is not None:
                    return claimed
            if not candidates or time.perf_counter() >= until:
                return None
            time.sleep(_WAIT_STEP_SECONDS)
        return None

    def _claim(self, found: str, size: int) -> tuple[str, int] | None:
        name = name_of("mr", size, os.getpid(), next(_counter))
        path = self._folders["m"] + name
        try:
            os.rename(self._idle_folder + found, path)  # noqa: PTH104
        except FileNotFoundError:
            return None  # another process claimed it first
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            os.rename(path, self._idle_folder + found)  # noqa: PTH104
            return None
        if files.is_unmapped(descriptor):
            self._meter.add(MeterRow.REUSED, size)
            return name, descriptor
        os.close(descriptor)
        os.rename(path, self._idle_folder + found)  # noqa: PTH104
        return None

    def _count_new(self, size: int) -> bool:
        """Count a segment that is about to be made; return False if the budget is exceeded.

        It is counted before the check, as other processes do the same concurrently. If two count a segment for the last
        room at once, both see the budget exceeded and neither gets it.
        """
        self._meter.add(MeterRow.MADE, size)
        if self._meter.held <= self.place.budget:
            return True
        self._meter.add(MeterRow.MADE, -size)
        return False

    def _evict(self) -> bool:
        """Remove the idle segments; return whether there were any."""
        n_evicted = 0
        for found in self._idle_names():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._idle_folder + found)  # noqa: PTH108
                size = int(found.partition("-")[0], 16)
                self._meter.add(MeterRow.EVICTED, size)
                self._meter.add(MeterRow.REMOVED, size)
                n_evicted += 1
        return n_evicted > 0

    # Reading

    def read(self, segment: Segment) -> list[memoryview]:
        """Map a segment read-only and return a view of each of its parts."""
        name, *parts = segment
        lengths = [part for part in parts if type(part) is int]
        whole = self._map(str(name)) if any(lengths) else memoryview(b"")  # an empty file cannot be mapped
        views, start = [], 0
        for part in parts:
            if type(part) is int:
                views.append(whole[start : start + part])
                start += part + -part % ALIGNMENT
            else:
                other, offset, length = part
                views.append(self._map(other)[offset : offset + length])
        return views

    def expect(self, segments: Sequence[Segment]) -> None:
        """Prepare to read these segments, for subclasses that fetch several at once."""

    def drop(self, names: Sequence[str]) -> None:
        """Stop keeping these segments mapped; a mapping lives on until the values read from it are deleted."""
        for name in names:
            self._mapped.pop(name, None)

    def _map(self, name: str) -> memoryview:
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        is_large = _is_large(name)
        try:
            descriptor = files.open_to_read(self._folders[name[0]] + name)
        except FileNotFoundError as error:
            add_note(
                error,
                "This file held a value of the run and was removed by another program, such as a cleaner of temporary "
                "files, or systemd-logind when a user logs out (RemoveIPC=). Run the workflow again.",
            )
            raise
        try:
            if is_large:
                files.lock(descriptor)  # the mapping has a copy of the descriptor, and so the lock
            view = files.map_to_read(descriptor)
        finally:
            os.close(descriptor)
        if is_large and self._keeps_mapped:
            self._mapped[name] = view
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        return view

    # Freeing

    def free(self, segment: Segment, *, keep: bool = True) -> None:
        """Free a segment and the segments that it refers to; existing mappings stay readable.

        Args:
            segment: as `write` returned it.
            keep: whether large segments may be kept for later values; False if they stay mapped.

        Does nothing in a forked child: the segments belong to its parent.
        """
        if os.getpid() != self._owner:
            return
        for name in names_of(segment):
            self._free(name, keep=keep)

    def _free(self, name: str, *, keep: bool) -> None:
        size = size_of(name)
        self._mapped.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            if keep and _is_large(name) and self._may_keep(size):
                os.rename(self._folders["m"] + name, self._idle_folder + name.partition("-")[2])  # noqa: PTH104
                self._meter.add(MeterRow.RETIRED, size)
            else:
                os.unlink(self._folders[name[0]] + name)  # noqa: PTH108  (called per value: a Path would cost more)
                if name[0] == "m":
                    self._meter.add(MeterRow.REMOVED, size)

    def _may_keep(self, size: int) -> bool:
        return self._has_idle_folder and 2 * (self._meter.idle + size) <= self.place.budget

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Free the segments that a dead process made or claimed, except those known to hold values."""
        if os.getpid() != self._owner:
            return
        for name in self.names():
            if name not in keep and maker_of(name) == pid:
                self._free(name, keep=False)

    # State

    def names(self) -> list[str]:
        """List the segments that hold values or are being filled."""
        found = []
        for kind, folder in self._folders.items():
            with contextlib.suppress(FileNotFoundError):
                found += [name for name in os.listdir(folder) if name[:2] in (kind + "n", kind + "r")]  # noqa: PTH208
        return sorted(found)

    def reset_peak(self) -> None:
        """Restart the search for the peak. Call it only while no other process writes."""
        self._meter.reset_peak()

    @property
    def bytes_held(self) -> int:
        """Bytes of values in shared memory, in whole size classes, without segments kept for later values."""
        return self._meter.held - self._meter.idle

    def usage(self) -> ArenaUsage:
        """Return what the arena holds, and its totals."""
        meter, spilled, reused = self._meter, self._meter.total(MeterRow.SPILLED), self._meter.total(MeterRow.REUSED)
        return ArenaUsage(len(self.names()), self.bytes_held, meter.idle, meter.peak, spilled, reused)

    def _idle_names(self) -> list[str]:
        try:
            return os.listdir(self._idle_folder)  # noqa: PTH208
        except FileNotFoundError:
            return []


def _is_large(name: str) -> bool:
    return name[0] == "m" and size_of(name) >= LEAST_KEPT


def _address(buffer: mmap.mmap | memoryview) -> int:
    import numpy as np  # it is loaded already if arrays are filled in place

    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
