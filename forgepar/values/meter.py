"""The meter of an arena: how many bytes it holds, counted by all processes that use it.

Shared memory of a few rows. Each process has a column that it alone writes, so no process locks another out; sums are
over rows.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading

from forgepar.forking import fork_safe


class Row(enum.IntEnum):
    """What is counted: bytes, size class by size class, since the arena was made."""

    MADE = 0  # in memory
    REMOVED = 1  # from memory
    RETIRED = 2  # kept for a later value
    REUSED = 3  # taken for a later value
    EVICTED = 4  # removed while kept for a later value
    SPILLED = 5  # made on disk
    PEAK = 6  # most that was in memory, as this process saw it


_N_ROWS = len(Row)


class Meter:
    """One process's view.

    Args:
        path: the file, made by `create`; where there is none, this process counts for itself.
        n_columns: how many processes have a column.
        column: which one is this process's.
    """

    def __init__(self, path: str, n_columns: int, column: int) -> None:
        self._words = _words(path, n_columns)
        self._n_columns = n_columns
        self._column = column
        self._lock = fork_safe(threading.RLock())  # threads share the column, signal handlers come amid one

    @staticmethod
    def create(path: str, n_columns: int) -> None:
        """Make the file of a meter at nought."""
        with open(path, "xb") as file:  # noqa: PTH123  (a worker need not load pathlib)
            file.write(bytes(_N_ROWS * n_columns * 8))

    def add(self, row: Row, amount: int) -> None:
        """Count something."""
        with self._lock:
            self._words[row * self._n_columns + self._column] += amount

    def total(self, row: Row) -> int:
        """Sum what all processes counted."""
        return sum(self._row(row))

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self.total(Row.MADE) - self.total(Row.REMOVED)

    @property
    def idle(self) -> int:
        """Bytes in memory that are kept for later values."""
        return self.total(Row.RETIRED) - self.total(Row.REUSED) - self.total(Row.EVICTED)

    @property
    def peak(self) -> int:
        """Most bytes that were in memory since `reset_peak`."""
        return max(self._row(Row.PEAK))

    def see_peak(self, most: int) -> None:
        """Note what is held now, but no more than can be: others may be counting what they will not get."""
        place = Row.PEAK * self._n_columns + self._column
        self._words[place] = max(self._words[place], min(self.held, most))

    def reset_peak(self) -> None:
        """Look for the peak anew; only while no other process counts."""
        row = self._row(Row.PEAK)
        for column in range(self._n_columns):
            row[column] = 0
        self.see_peak(self.held)

    def _row(self, row: Row) -> memoryview:
        return self._words[row * self._n_columns : (row + 1) * self._n_columns]


def _words(path: str, n_columns: int) -> memoryview:
    n_bytes = _N_ROWS * n_columns * 8
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return memoryview(bytearray(n_bytes)).cast("q")
    try:
        return memoryview(mmap.mmap(descriptor, n_bytes)).cast("q")
    finally:
        os.close(descriptor)
