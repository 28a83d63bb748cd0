"""Large values that travel inside messages, for workers that share no memory with the caller.

    MessageArena.write ──> bytes of this process ──pack──> message ──take_in──> bytes there ──> MessageArena.read

They have the names of segments and are read and freed like segments, so the dispatcher sees no difference.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from forgepar.values.arena import NO_BUDGET, Arena, ArenaLocation, ArenaUsage
from forgepar.values.segments import Segment, name_of, size_class

SegmentParts: TypeAlias = Mapping[str, Sequence[bytes]]  # by the name of the segment: its pickle and buffers


class MessageArena(Arena):
    """An arena that keeps its segments as bytes objects of this process.

    Args:
        maker: a number that no other process of a run has.
        folder: where scratch folders are made; None: the temporary folder.
    """

    def __init__(self, maker: int, folder: str | None = None) -> None:
        self.place = ArenaLocation("", folder or tempfile.gettempdir(), NO_BUDGET, 1)
        self._maker = maker
        self._count = itertools.count()
        self._bytes: dict[str, Sequence[bytes]] = {}
        self._held = self._peak = 0

    def pack(self, names: Iterable[str]) -> dict[str, Sequence[bytes]]:
        """Return the contents of some segments for a message; the arena keeps them."""
        return {name: self._bytes[name] for name in names}

    def take_in(self, parts: SegmentParts) -> None:
        """Add the segments that a message brought."""
        for name, held in parts.items():
            self._add(name, held)

    def empty(self) -> dict[str, Sequence[bytes]]:
        """Remove all segments and return them."""
        held, self._bytes = self._bytes, {}
        self._held = 0
        return held

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Copy a value; see `Arena.write`."""
        held = [bytes(part) for part in parts if not isinstance(part, tuple)]
        assert len(held) == len(parts), "this arena grants no buffers, so no part can be in one"
        name = name_of("mn", size_class(sum(map(len, held))), self._maker, next(self._count))
        self._add(name, held)
        return (name, *map(len, held))

    def read(self, segment: Segment) -> list[memoryview]:
        """Return a read-only view of each part."""
        return [memoryview(part) for part in self._bytes[segment[0]]]

    def granted(self, buffer: memoryview) -> None:
        """Return None: the arena grants no buffers, as `forgepar.empty` makes ordinary arrays here."""

    def give(self, segment: Segment) -> None:
        """Do nothing: the arena grants no buffers."""

    def take_back(self) -> None:
        """Do nothing: the arena grants no buffers."""

    def drop(self, names: Sequence[str]) -> None:
        """Do nothing: no segment is mapped."""

    def free(self, segment: Segment, *, keep: bool = True) -> None:  # noqa: ARG002
        """Remove a segment; views that `read` returned stay valid."""
        held = self._bytes.pop(segment[0], None)
        if held is not None:
            self._held -= sum(map(len, held))

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Do nothing: the segments of a lost worker were in its own memory."""

    def names(self) -> list[str]:
        """Return the names of all segments."""
        return sorted(self._bytes)

    def reset_peak(self) -> None:
        """Start a new measurement of the peak size."""
        self._peak = self._held

    @property
    def bytes_held(self) -> int:
        """Bytes of all values."""
        return self._held

    def usage(self) -> ArenaUsage:
        """Return the count of segments, their bytes and the peak."""
        return ArenaUsage(len(self._bytes), self._held, 0, self._peak, 0, 0)

    def _add(self, name: str, held: Sequence[bytes]) -> None:
        self._bytes[name] = held
        self._held += sum(map(len, held))
        self._peak = max(self._peak, self._held)
