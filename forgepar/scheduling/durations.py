"""Batch sizes from measured task durations.

A message costs about 0.1 ms whatever its size, so a batch aims at `TARGET_SECONDS` of work. Until a duration is known,
a batch has one task. It never has more than an even share of the ready tasks.
"""

from __future__ import annotations

import math

TARGET_SECONDS = 0.005  # of work per batch: fifty times the cost of its message, and too short for a user to notice
_WEIGHT = 0.5  # of the newest observation in the moving average (0 to 1)
_GROWTH = 8  # a batch is at most this many times the largest one observed: one short task proves little


class Durations:
    """Moving averages of task durations, one per callable.

    Args:
        n_callables: the number of callables.
        target_seconds: seconds of work that a batch aims at.

    Attributes:
        seconds: the average of each callable; nan until a task of it was observed.
    """

    def __init__(self, n_callables: int, target_seconds: float = TARGET_SECONDS) -> None:
        self._target_seconds = target_seconds
        self.seconds = [math.nan] * n_callables
        self._seen = [0] * n_callables

    def grow(self, n_callables: int) -> None:
        """Make room for more callables."""
        n_new = max(0, n_callables - len(self.seconds))
        self.seconds += [math.nan] * n_new
        self._seen += [0] * n_new

    def forget(self) -> None:
        """Discard the observations of all callables."""
        self.seconds[:] = [math.nan] * len(self.seconds)
        self._seen[:] = [0] * len(self._seen)

    def observe(self, number: int, seconds: float, n_tasks: int) -> None:
        """Record that ``n_tasks`` tasks of a callable took ``seconds`` together.

        The average rises at once and falls gradually: tasks that wait after slow ones cost more than an extra message.
        """
        mean = seconds / n_tasks
        known = self.seconds[number]
        if known != known or mean > known:
            self.seconds[number] = mean
        else:
            self.seconds[number] = known + _WEIGHT * (mean - known)
        if n_tasks > self._seen[number]:
            self._seen[number] = n_tasks

    def batch_size(self, number: int, n_ready: int, n_slots: int) -> int:
        """Return how many tasks of a callable to send together, at least 1.

        Args:
            number: which callable.
            n_ready: the number of ready tasks of all callables.
            n_slots: the number of slots that share them.
        """
        seen = self._seen[number]
        if not seen:
            return 1
        wanted = min(int(self._target_seconds / max(self.seconds[number], 1e-9)), seen * _GROWTH)
        return max(1, min(wanted, -(-n_ready // n_slots)))
