"""What processes take of the machine, asked now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

_LEAST_SECONDS = 1.0  # between two looks: CPU time over less says little


class Usage(NamedTuple):
    """What a process takes.

    Attributes:
        cpu: percent of one core, since the last look.
        memory: resident, bytes.
    """

    cpu: float
    memory: int


class Processes:
    """Looks at processes, and remembers them from one look to the next."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._found: dict[int, Usage] = {}
        self._looked_at = -_LEAST_SECONDS

    def usage(self, pids: Sequence[int]) -> dict[int, Usage]:
        """Return by pid what processes take, of those that there are; it may be a second old."""
        now = time.perf_counter()
        if now - self._looked_at >= _LEAST_SECONDS or not self._found.keys() >= set(pids):
            self._looked_at = now
            self._found = {pid: found for pid in pids if (found := self._look(pid)) is not None}
        return self._found

    def usage_below(self, pid: int) -> dict[int, Usage]:
        """Return by pid what a process takes and all that it started."""
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return {}
        return self.usage([pid, *(child.pid for child in children)])

    def _look(self, pid: int) -> Usage | None:
        try:
            process = self._known.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                return Usage(process.cpu_percent(), process.memory_info().rss)
        except psutil.Error:
            self._known.pop(pid, None)
            return None
