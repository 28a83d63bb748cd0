"""What each worker holds, as its parent knows it.

A worker keeps what it is sent or makes until a batch tells it to drop it, so both sides always agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from forgepar.backends.surroundings import PackedSurroundings
from forgepar.values.codec import Wire, wire_bytes
from forgepar.values.segments import LEAST_KEPT, Segment, names_of, size_of

KEPT_BYTES = 64 << 20  # of small values that a worker keeps for later tasks


class WorkerCache:
    """What one worker holds: callables, templates, and small values up to `KEPT_BYTES`, dropped by least recent use.

    Attributes:
        surroundings: the caller's state that it last got, where that can change within a run; None at first.
        is_to_unmap: whether it must unmap segments that were not named to it yet.
        n_parts: how many parts of modules it was sent.
        parts: by name, the part of a module that it has.
        keys: the script's globals as it last got them.
    """

    def __init__(self) -> None:
        self.n_parts = 0
        self.parts: dict[tuple[str, str], int] = {}
        self.keys: dict[tuple[str, str], Any] = {}
        self.callables: set[int] = set()
        self.templates: set[int] = set()
        self.surroundings: PackedSurroundings | None = None
        self.is_to_unmap = False
        self._dropped: set[int | str] = set()
        self._mapped: set[str] = set()
        self._blobs: OrderedDict[int, int] = OrderedDict()
        self._n_bytes = 0

    def forget_run(self) -> None:
        """Note that the worker forgets all of a run, except segments, which it unmaps when a batch names them."""
        self.callables.clear()
        self.templates.clear()
        self._blobs.clear()
        self._n_bytes = 0
        self._dropped = {name for name in self._dropped if isinstance(name, str)}

    def lets_go(self, task: int) -> None:
        """Note that a small value that the worker made is not needed."""
        self._dropped.add(task)

    def add(self, task: int, wire: Wire) -> None:
        """Note one more small value, and drop the least recently used ones for it."""
        self._n_bytes -= self._blobs.pop(task, 0)
        self._blobs[task] = size = wire_bytes(wire)
        self._dropped.discard(task)
        self._n_bytes += size
        while self._n_bytes > KEPT_BYTES:
            oldest, size = self._blobs.popitem(last=False)
            self._n_bytes -= size
            self._dropped.add(oldest)

    def maps(self, segment: Segment) -> None:
        """Note that the worker gets a segment."""
        self._mapped.update(name for name in names_of(segment) if size_of(name) >= LEAST_KEPT)

    def freed(self, segment: Segment) -> None:
        """Note that a segment must be unmapped."""
        if self._mapped:
            gone = self._mapped.intersection(names_of(segment))
            self._mapped -= gone
            self._dropped |= gone
            self.is_to_unmap |= bool(gone)

    def unmap_all(self) -> None:
        """Note that all segments must be unmapped."""
        self._dropped |= self._mapped
        self.is_to_unmap |= bool(self._mapped)
        self._mapped.clear()

    def drops(self) -> Sequence[int | str]:
        """Return what the worker must drop after it has read the values of the next batch."""
        if not self._dropped:
            return ()
        dropped, self._dropped = tuple(self._dropped), set()
        self.is_to_unmap = False
        return dropped

    def thin(self, tasks: list[int], wires: list[Wire]) -> list[Wire]:
        """Replace small values that the worker holds by their numbers, and number those that it must keep."""
        if tuple not in set(map(type, wires)):
            return wires
        return [self._thin(task, wire) for task, wire in zip(tasks, wires, strict=True)]

    def _thin(self, task: int, wire: Wire) -> Wire:
        if type(wire) is not tuple:
            return wire
        if type(wire[0]) is not bytes:
            self.maps(wire)
            return wire
        if task in self._blobs:
            self._blobs.move_to_end(task)
            return (task,)
        self.add(task, wire)
        return (wire[0], task)
