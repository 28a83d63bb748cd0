"""CPU time and memory of processes, measured at intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

_LEAST_SECONDS = 1.0  # between two measurements; CPU time over less is noise


class Usage(NamedTuple):
    """Usage of a process.

    Attributes:
        cpu: percent of one core, since the last measurement.
        memory: resident memory, bytes.
    """

    cpu: float
    memory: int


class Processes:
    """Measures processes, and keeps their handles between measurements."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._found: dict[int, Usage] = {}
        self._measured_at = -_LEAST_SECONDS

    def usage(self, pids: Sequence[int]) -> dict[int, Usage]:
        """Return the usage of existing processes by pid, at most a second old."""
        now = time.perf_counter()
        if now - self._measured_at >= _LEAST_SECONDS or not self._found.keys() >= set(pids):
            self._measured_at = now
            self._found = {pid: found for pid in pids if (found := self._measure(pid)) is not None}
        return self._found

    def usage_below(self, pid: int) -> dict[int, Usage]:
        """Return the usage of a process and its descendants by pid."""
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return {}
        return self.usage([pid, *(child.pid for child in children)])

    def _measure(self, pid: int) -> Usage | None:
        try:
            process = self._known.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                return Usage(process.cpu_percent(), process.memory_info().rss)
        except psutil.Error:
            self._known.pop(pid, None)
            return None
