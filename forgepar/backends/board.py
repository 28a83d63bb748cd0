"""The board: shared memory in which each worker says what it runs, and the parent says where it must stop.

One row a slot, written without a message or a system call:

    POSITION   worker   mark of the task it is at: batch << 32 | position in the batch
    STARTED    worker   when that task began, seconds of `time.perf_counter` (a float64); in the future, while the
                        worker unpickles what it needs, by the time that it may take for that
    LIMIT      parent   the first mark the worker must not begin; NO_LIMIT normally
    CALLED_OFF parent   1 when the run was called off or has failed, so that tasks can ask

One row more tells workers of the run, whatever the parent writes there.

Marks grow for the life of a slot, so one comparison covers the rest of a batch and every batch behind it.
A worker writes POSITION before it reads LIMIT. A parent that wrote LIMIT therefore knows, a little later (a store is
seen by other cores within microseconds), that a POSITION below LIMIT stays below: what lies behind is its own again.
"""

from __future__ import annotations

import mmap
import os

POSITION, STARTED, LIMIT, CALLED_OFF = 0, 1, 2, 3
NO_LIMIT = (1 << 63) - 1
_ROW = 8  # words of 8 bytes: a row fills one cache line, so slots do not slow each other


class Board:
    """A file of one row a slot, mapped by the parent and by every worker.

    Args:
        path: the board's file, made by `create`.
    """

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._words = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)

    @classmethod
    def create(cls, path: str, slots: int) -> Board:
        """Make the file of a board with ``slots`` rows, none of them limited."""
        with open(path, "xb") as file:  # noqa: PTH123
            file.write(bytes((slots + 1) * _ROW * 8))
        board = cls(path)
        for slot in range(slots):
            board.reset(slot)
        return board

    @classmethod
    def in_memory(cls, slots: int) -> Board:
        """Make a board for the threads of this process alone."""
        board = cls.__new__(cls)
        board._words = memoryview(bytearray((slots + 1) * _ROW * 8))
        for slot in range(slots):
            board.reset(slot)
        return board

    @property
    def run(self) -> memoryview:
        """The row that tells of the run: signed 64-bit integers."""
        return self._row(len(self._words) // (_ROW * 8) - 1).cast("q")

    def integers(self, slot: int) -> memoryview:
        """Return a slot's row as signed 64-bit integers."""
        return self._row(slot).cast("q")

    def floats(self, slot: int) -> memoryview[float]:
        """Return a slot's row as float64."""
        return self._row(slot).cast("d")

    def reset(self, slot: int) -> None:
        """Clear a slot's row for a new worker."""
        row = self.integers(slot)
        row[POSITION] = row[STARTED] = row[CALLED_OFF] = 0
        row[LIMIT] = NO_LIMIT

    def _row(self, slot: int) -> memoryview:
        return self._words[slot * _ROW * 8 : (slot + 1) * _ROW * 8]


def mark(batch: int, position: int) -> int:
    """Return the mark of a task by its batch's number and its position there."""
    return batch << 32 | position


def unmark(value: int) -> tuple[int, int]:
    """Return the batch and the position of a mark."""
    return value >> 32, value & 0xFFFFFFFF
