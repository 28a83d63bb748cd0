"""Segments: files in shared memory through which large values go from process to process without a copy.

    write, grant ──> segment ──> read (mapped, any number of times) ──> free ──> free list ──> write, grant
                        │                                                 └──> unlinked: small, or the list is full
                        └──> on disk, where the memory budget is used up or shared memory is full

A segment is written once, mapped read-only by whoever needs it, and freed when nobody is to take its value any more.
Large ones are then kept for the next value of their size class: pages that exist already are written three times as
fast as new ones. Whoever maps a large segment holds a shared lock on it, and nobody writes to one again that is still
mapped: the kernel drops the lock with the mapping, and with the process that dies.

Any process may do any of this at any time: claiming a freed segment is one rename. What is in use is counted in a
meter, shared memory again, of which every process writes one column.
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

from forgepar.errors import ArenaFull, WrongProcess, add_note
from forgepar.values.files import is_unmapped, lock, make, map_to_read, map_to_write, open_to_read, reserve, write_all
from forgepar.values.meter import Meter, Row
from forgepar.values.segment import ALIGNMENT, LEAST_KEPT, Segment, maker_of, name_of, names_of, size_class, size_of

if TYPE_CHECKING:
    from pathlib import Path

NO_BUDGET = (1 << 63) - 1
METER, IDLE = "meter", "idle"  # what else is in the folder: that file, and the folder of segments kept for later
# How long to wait for a kept segment that is still mapped: workers let go when they are told to, within 0.2 ms, and a
# new segment costs ten times as much as this.
_WAIT_SECONDS_A_BYTE = 2e-11
_WAIT_STEP_SECONDS = 1e-4
_MOST_MAPPED = 64  # segments that a worker keeps mapped for later tasks
_counter = itertools.count()


class Place(NamedTuple):
    """Where an arena is, as it travels to workers.

    Attributes:
        folder: of segments in memory, and of the meter.
        spill_folder: of segments on disk.
        budget: most bytes in memory, those kept for later included.
        n_columns: how many processes have a column in the meter.
    """

    folder: str
    spill_folder: str
    budget: int
    n_columns: int


class Usage(NamedTuple):
    """What an arena holds and has done, bytes (whole size classes) but for the count.

    Attributes:
        n_segments: how many segments have a value.
        in_use: their size in memory.
        idle: size of those in memory that are kept for later values.
        peak: most that ever was in memory, used or idle.
        spilled: how much ever went to disk.
        reused: how much was ever written to segments that were kept.
    """

    n_segments: int
    in_use: int
    idle: int
    peak: int
    spilled: int
    reused: int


class _Grant(NamedTuple):
    """A segment that a task got to fill in place: its name, where it is mapped, and whether it still is."""

    name: str
    address: int
    n_bytes: int
    mapping: weakref.ref[mmap.mmap]


class Arena:
    """One process's hold on an arena.

    Args:
        place: where it is; a folder alone stands for an arena without budget.
        column: which column of the meter this process writes.
        keeps_mapped: whether large segments stay mapped until `drop`.
    """

    blob_limit = 32 * 1024  # bytes of pickle; below it a copy is cheaper than a segment's open, map and unlink

    def __init__(self, place: Place | str | Path, column: int = 0, *, keeps_mapped: bool = False) -> None:
        if not isinstance(place, Place):
            place = Place(str(place), str(place), NO_BUDGET, 1)
        self.place = place
        self._folders = {"m": place.folder + os.sep, "d": place.spill_folder + os.sep}
        self._idle_folder = place.folder + os.sep + IDLE + os.sep
        self._has_idle_folder = os.path.isdir(self._idle_folder)  # noqa: PTH112
        self._meter = Meter(place.folder + os.sep + METER, place.n_columns, column)
        self._keeps_mapped = keeps_mapped
        self._owner = os.getpid()
        self._mapped: OrderedDict[str, memoryview] = OrderedDict()
        self._grants: list[_Grant] = []

    @property
    def folder(self) -> Path:
        """The folder in memory."""
        from pathlib import Path  # a worker need not load it

        return Path(self.place.folder)

    # Writing

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Write a new segment, its parts each at a multiple of `ALIGNMENT`.

        Args:
            parts: what to write; or where it lies already.

        Returns:
            what `read` and `free` take.

        Raises:
            ArenaFull: neither memory nor disk has room.
        """
        own = [part for part in parts if not isinstance(part, tuple)]
        n_bytes = sum(len(part) + -len(part) % ALIGNMENT for part in own)
        name = self._write(own, n_bytes)
        return (name, *(part if type(part) is tuple else len(part) for part in parts))

    def grant(self, n_bytes: int) -> mmap.mmap:
        """Map a new segment for writing; its content is whatever was there.

        It is remembered until what lies in it is written (`granted`, `give`), or nobody has it any more (`take_back`).

        Raises:
            ArenaFull: neither memory nor disk has room.
        """
        name, descriptor = self._take(n_bytes, reserve)
        try:
            lock(descriptor)
            mapping = map_to_write(descriptor, n_bytes)
            self._grants.append(_Grant(name, _address(mapping), n_bytes, weakref.ref(mapping)))
        except BaseException:
            self.free((name,), keep=False)
            raise
        finally:
            os.close(descriptor)
        return mapping

    def granted(self, buffer: memoryview) -> tuple[str, int, int] | None:
        """Tell where a buffer lies, if that is in a segment that was granted: (name, offset, length)."""
        if not self._grants or not len(buffer):
            return None
        address = _address(buffer)
        for grant in self._grants:
            offset = address - grant.address
            if offset >= 0 and offset + len(buffer) <= grant.n_bytes and grant.mapping() is not None:
                return grant.name, offset, len(buffer)
        return None

    def give(self, segment: Segment) -> None:
        """Hand the granted segments that parts of this one lie in over to whoever gets it: they have one value now."""
        if self._grants:
            given = names_of(segment)[1:]
            self._grants = [grant for grant in self._grants if grant.name not in given]

    def take_back(self) -> None:
        """Free the granted segments that nobody has any more."""
        for grant in [grant for grant in self._grants if grant.mapping() is None]:
            self._grants.remove(grant)
            self.free((grant.name,))

    def _write(self, parts: Sequence[bytes | memoryview], n_bytes: int) -> str:
        name, descriptor = self._take(n_bytes, lambda opened, _: write_all(opened, parts))
        os.close(descriptor)
        return name

    def _take(self, n_bytes: int, fill: Callable[[int, int], None]) -> tuple[str, int]:
        """Open a segment of this size, kept, new or on disk, and fill it."""
        if os.getpid() != self._owner:  # both would count in one column of the meter
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
                        f"a value of {n_bytes} bytes finds no room: the budget of {self.place.budget} bytes in "
                        f"{self.place.folder} is used up, or its file system is full, and so is "
                        f"{self.place.spill_folder} ({error}). Give more memory_budget=, keep fewer outputs, or "
                        "point TMPDIR to a larger disk."
                    ) from error
                add_note(error, f"raised while a value of {n_bytes} bytes was being written to {self._folder_of(name)}")
                raise
            return name, descriptor
        raise AssertionError("the last candidate is on disk, and its failure was raised")

    def _folder_of(self, name: str) -> str:
        return self._folders[name[0]].rstrip(os.sep)

    def _candidates(self, size: int) -> Iterator[tuple[str, int]]:
        """Yield opened segments to try, the best first; whoever does not use one frees it."""
        if size >= LEAST_KEPT and (kept := self._reuse(size)) is not None:
            yield kept
        if self._book(size):
            yield self._make("mn", size)
        if self._evict() and self._book(size):
            yield self._make("mn", size)
        yield self._make("dn", size)

    def _make(self, kind: str, size: int) -> tuple[str, int]:
        name = name_of(kind, size, os.getpid(), next(_counter))
        try:
            descriptor = make(self._folders[kind[0]] + name)
        except OSError as error:
            if kind[0] == "m":
                self._meter.add(Row.MADE, -size)
            add_note(error, f"raised while a file for a large value was being made in {self._folders[kind[0]]}")
            raise
        if kind[0] == "m":
            self._meter.see_peak(self.place.budget)
        else:
            self._meter.add(Row.SPILLED, size)
        return name, descriptor

    def _reuse(self, size: int) -> tuple[str, int] | None:
        """Claim a kept segment of this size that nobody has mapped any more."""
        until = time.perf_counter() + size * _WAIT_SECONDS_A_BYTE
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
            return None  # somebody else was quicker
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            os.rename(path, self._idle_folder + found)  # noqa: PTH104
            return None
        if is_unmapped(descriptor):
            self._meter.add(Row.REUSED, size)
            return name, descriptor
        os.close(descriptor)
        os.rename(path, self._idle_folder + found)  # noqa: PTH104
        return None

    def _book(self, size: int) -> bool:
        """Count a segment to be made, unless it is too much: first count, then look, as others do the same meanwhile.

        Two that book the last room at once both see too much, and both do without.
        """
        self._meter.add(Row.MADE, size)
        if self._meter.held <= self.place.budget:
            return True
        self._meter.add(Row.MADE, -size)
        return False

    def _evict(self) -> bool:
        """Remove what is kept for later."""
        n_evicted = 0
        for found in self._idle_names():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._idle_folder + found)  # noqa: PTH108
                size = int(found.partition("-")[0], 16)
                self._meter.add(Row.EVICTED, size)
                self._meter.add(Row.REMOVED, size)
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
        """Take note that these are about to be read, where it helps to have them come together."""

    def drop(self, names: Sequence[str]) -> None:
        """Keep these segments mapped no longer than somebody needs what was read from them."""
        for name in names:
            self._mapped.pop(name, None)

    def _map(self, name: str) -> memoryview:
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        is_large = _is_large(name)
        descriptor = open_to_read(self._folders[name[0]] + name)
        try:
            if is_large:
                lock(descriptor)  # the mapping has a copy of the descriptor, and so the lock
            view = map_to_read(descriptor)
        finally:
            os.close(descriptor)
        if is_large and self._keeps_mapped:
            self._mapped[name] = view
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        return view

    # Freeing

    def free(self, segment: Segment, *, keep: bool = True) -> None:
        """Give up a segment, and those that parts of it lie in; what is mapped stays readable.

        Args:
            segment: what `write` returned.
            keep: whether large ones may be kept for later values; not if they stay mapped.

        Does nothing in a forked child: what there is, is its parent's.
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
                self._meter.add(Row.RETIRED, size)
            else:
                os.unlink(self._folders[name[0]] + name)  # noqa: PTH108  (called per value: no Path is made for it)
                if name[0] == "m":
                    self._meter.add(Row.REMOVED, size)

    def _may_keep(self, size: int) -> bool:
        return self._has_idle_folder and 2 * (self._meter.idle + size) <= self.place.budget

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Free what a dead process had made or claimed, but for the segments that are known to hold values."""
        if os.getpid() != self._owner:
            return
        for name in self.names():
            if name not in keep and maker_of(name) == pid:
                self._free(name, keep=False)

    # Telling

    def names(self) -> list[str]:
        """List the segments that hold values, or are being filled."""
        found = []
        for kind, folder in self._folders.items():
            with contextlib.suppress(FileNotFoundError):
                found += [name for name in os.listdir(folder) if name[:2] in (kind + "n", kind + "r")]  # noqa: PTH208
        return sorted(found)

    def reset_peak(self) -> None:
        """Begin to look for the most that is held anew; only while no other process writes."""
        self._meter.reset_peak()

    @property
    def bytes_held(self) -> int:
        """What values take in shared memory, whole size classes, those kept for later values left out."""
        return self._meter.held - self._meter.idle

    def usage(self) -> Usage:
        """Tell what is held, and what was done so far."""
        return Usage(
            len(self.names()),
            self.bytes_held,
            self._meter.idle,
            self._meter.peak,
            self._meter.total(Row.SPILLED),
            self._meter.total(Row.REUSED),
        )

    def _idle_names(self) -> list[str]:
        try:
            return os.listdir(self._idle_folder)  # noqa: PTH208
        except FileNotFoundError:
            return []


def _is_large(name: str) -> bool:
    return name[0] == "m" and size_of(name) >= LEAST_KEPT


def _address(buffer: mmap.mmap | memoryview) -> int:
    import numpy as np  # only who filled arrays in place comes here

    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
