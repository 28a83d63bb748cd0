"""The board: shared memory in which each worker writes its current task, and the parent writes where it must stop.

There is one row per slot. Writing needs neither a message nor a system call.

    POSITION   worker   mark of its current task: batch << 32 | position in the batch
    STARTED    worker   when that task began, seconds of `time.perf_counter` (a float64); a time in the future
                        (PREPARE_SECONDS) while the worker unpickles what the task needs
    LIMIT      parent   the first mark that the worker must not begin; normally NO_LIMIT
    CALLED_OFF parent   1 when the run was cancelled or has failed, for tasks that ask

One more row contains what the parent publishes about the run.

Marks grow for the life of a slot, so one comparison covers the rest of a batch and every later batch.
A worker writes POSITION before it reads LIMIT, and other cores see a write within microseconds. So shortly after the
parent has written LIMIT, a POSITION below LIMIT stays below, and the parent can reclaim the tasks after LIMIT.
"""

from __future__ import annotations

import mmap
import os

POSITION, STARTED, LIMIT, CALLED_OFF = 0, 1, 2, 3
NO_LIMIT = (1 << 63) - 1
_ROW = 8  # integers of 8 bytes: a row fills one cache line, so slots do not slow each other down


class Board:
    """A file of one row per slot, which the parent and every worker map.

    Args:
        path: the board's file, see `create`.
    """

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._memory = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)

    @classmethod
    def create(cls, path: str, slots: int) -> Board:
        """Create the file of a board with ``slots`` rows without limits."""
        with open(path, "xb") as file:  # noqa: PTH123
            file.write(bytes((slots + 1) * _ROW * 8))
        board = cls(path)
        for slot in range(slots):
            board.reset(slot)
        return board

    @classmethod
    def alone(cls, slots: int) -> Board:
        """Create a board that only this process sees, for a worker with its parent on another machine."""
        board = cls.__new__(cls)
        board._memory = memoryview(bytearray((slots + 1) * _ROW * 8))
        for slot in range(slots):
            board.reset(slot)
        return board

    @property
    def run(self) -> memoryview:
        """The row about the run, as signed 64-bit integers."""
        return self._row(len(self._memory) // (_ROW * 8) - 1).cast("q")

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
        return self._memory[slot * _ROW * 8 : (slot + 1) * _ROW * 8]


def mark(batch: int, position: int) -> int:
    """Return the mark of a task from its batch's number and its position there."""
    return batch << 32 | position


def unmark(value: int) -> tuple[int, int]:
    """Return the batch and the position of a mark."""
    return value >> 32, value & 0xFFFFFFFF
