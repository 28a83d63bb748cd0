"""Usage meter of an arena: counts of bytes, in shared memory, that all processes of the arena update.

It is a table of 64-bit integers with a row per `MeterRow` and a column per process. Each process writes only its own
column, so no lock between processes is needed; a count is the sum of a row.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading

from forgepar.system.forking import fork_safe


class MeterRow(enum.IntEnum):
    """Counters: bytes of whole size classes since the arena was made."""

    MADE = 0  # in memory
    REMOVED = 1  # from memory
    RETIRED = 2  # kept for a later value
    REUSED = 3  # taken for a later value
    EVICTED = 4  # removed while kept for a later value
    SPILLED = 5  # made on disk
    PEAK = 6  # maximum in memory, as this process saw it


_N_ROWS = len(MeterRow)


class UsageMeter:
    """Meter as one process uses it.

    Args:
        path: the file that `create` made; if it does not exist, this process counts for itself.
        n_columns: number of processes that have a column.
        column: the column of this process.
    """

    def __init__(self, path: str, n_columns: int, column: int) -> None:
        self._words = _words(path, n_columns)
        self._n_columns = n_columns
        self._column = column
        self._lock = fork_safe(threading.RLock())  # threads share the column, and a signal handler may interrupt one

    @staticmethod
    def create(path: str, n_columns: int) -> None:
        """Create the file of a meter, with all counters zero."""
        with open(path, "xb") as file:  # noqa: PTH123  (a worker need not load pathlib)
            file.write(bytes(_N_ROWS * n_columns * 8))

    def add(self, row: MeterRow, amount: int) -> None:
        """Add an amount to a counter."""
        with self._lock:
            self._words[row * self._n_columns + self._column] += amount

    def total(self, row: MeterRow) -> int:
        """Return the sum of a counter over all processes."""
        return sum(self._row(row))

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self.total(MeterRow.MADE) - self.total(MeterRow.REMOVED)

    @property
    def idle(self) -> int:
        """Bytes in memory that are kept for later values."""
        return self.total(MeterRow.RETIRED) - self.total(MeterRow.REUSED) - self.total(MeterRow.EVICTED)

    @property
    def peak(self) -> int:
        """Maximum bytes in memory since `reset_peak`."""
        return max(self._row(MeterRow.PEAK))

    def see_peak(self, most: int) -> None:
        """Update the peak from `held`, but to at most ``most``: others may count segments that they will not get."""
        place = MeterRow.PEAK * self._n_columns + self._column
        self._words[place] = max(self._words[place], min(self.held, most))

    def reset_peak(self) -> None:
        """Restart the search for the peak. Call it only while no other process writes."""
        row = self._row(MeterRow.PEAK)
        for column in range(self._n_columns):
            row[column] = 0
        self.see_peak(self.held)

    def _row(self, row: MeterRow) -> memoryview:
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
