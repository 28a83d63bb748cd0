"""Large values that travel inside of messages, where those who run tasks share no memory with whoever sends them.

    arena.write ──> bytes held here ──pack──> message ──take_in──> bytes held there ──> arena.read

They have the names of segments and are read and freed as such, so that nobody above sees the difference.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from forgepar.values.arena import NO_BUDGET, Arena, Place, Usage
from forgepar.values.segment import Segment, name_of, size_class

Parts: TypeAlias = Mapping[str, Sequence[bytes]]


class Baggage(Arena):
    """An arena whose segments are bytes of this process.

    Args:
        maker: a number that no other process of a run has.
        folder: where scratch folders may be made; None: the temporary folder.
    """

    def __init__(self, maker: int, folder: str | None = None) -> None:
        self.place = Place("", folder or tempfile.gettempdir(), NO_BUDGET, 1)
        self._maker = maker
        self._count = itertools.count()
        self._bytes: dict[str, Sequence[bytes]] = {}
        self._held = self._peak = 0

    def pack(self, names: Iterable[str]) -> dict[str, Sequence[bytes]]:
        """Return what is to travel of some segments; it stays here as well."""
        return {name: self._bytes[name] for name in names}

    def take_in(self, parts: Parts) -> None:
        """Hold what a message brought."""
        for name, held in parts.items():
            self._add(name, held)

    def empty(self) -> dict[str, Sequence[bytes]]:
        """Return all that is held, and hold nothing any more."""
        held, self._bytes = self._bytes, {}
        self._held = 0
        return held

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Copy a value; see `Arena.write`."""
        held = [bytes(part) for part in parts if not isinstance(part, tuple)]
        assert len(held) == len(parts), "nothing was granted that a part could lie in"
        name = name_of("mn", size_class(sum(map(len, held))), self._maker, next(self._count))
        self._add(name, held)
        return (name, *map(len, held))

    def read(self, segment: Segment) -> list[memoryview]:
        """Return a read-only view of each of its parts."""
        return [memoryview(part) for part in self._bytes[segment[0]]]

    def granted(self, buffer: memoryview) -> None:
        """Tell that nothing was filled in place: `empty` makes ordinary arrays here."""

    def give(self, segment: Segment) -> None:
        """Do nothing, for the same reason."""

    def take_back(self) -> None:
        """Do nothing, for the same reason."""

    def drop(self, names: Sequence[str]) -> None:
        """Do nothing: nothing is mapped."""

    def free(self, segment: Segment, *, keep: bool = True) -> None:  # noqa: ARG002
        """Hold a segment no longer; what was read of it stays."""
        held = self._bytes.pop(segment[0], None)
        if held is not None:
            self._held -= sum(map(len, held))

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Do nothing: what a lost worker had begun to write went with it."""

    def names(self) -> list[str]:
        """List the segments that are held."""
        return sorted(self._bytes)

    def reset_peak(self) -> None:
        """Begin to look for the most that is held anew."""
        self._peak = self._held

    @property
    def bytes_held(self) -> int:
        """What values take here."""
        return self._held

    def usage(self) -> Usage:
        """Tell what is held."""
        return Usage(len(self._bytes), self._held, 0, self._peak, 0, 0)

    def _add(self, name: str, held: Sequence[bytes]) -> None:
        self._bytes[name] = held
        self._held += sum(map(len, held))
        self._peak = max(self._peak, self._held)
