"""How many tasks to send together, from how long they took so far.

A message costs about 0.1 ms however much is in it, so a batch aims at `TARGET_SECONDS` of work. It is one task while
nothing is known, and never more than an even share of what is ready.
"""

from __future__ import annotations

import math

TARGET_SECONDS = 0.005  # of work a batch: fifty times what its message costs, and short beside what people wait for
_WEIGHT = 0.5  # of the newest observation in the moving average
_GROWTH = 8  # a batch is at most this many times the last one observed: one quick task proves little


class Durations:
    """Moving averages of task durations, one a callable.

    Args:
        n_callables: how many there are.
        target_seconds: of work that a batch aims at.

    Attributes:
        seconds: the average of each callable; nan while nothing is known.
    """

    def __init__(self, n_callables: int, target_seconds: float = TARGET_SECONDS) -> None:
        self._target_seconds = target_seconds
        self.seconds = [math.nan] * n_callables
        self._seen = [0] * n_callables

    def grow(self, n_callables: int) -> None:
        """Make room for more callables."""
        n_new = n_callables - len(self.seconds)
        self.seconds += [math.nan] * n_new
        self._seen += [0] * n_new

    def observe(self, number: int, seconds: float, n_tasks: int) -> None:
        """Take in that ``n_tasks`` tasks of a callable took ``seconds`` together.

        A rise counts in full at once, a fall by degrees: to hold tasks back behind slow ones costs more than a message.
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
            n_ready: how many tasks are ready, of any callable.
            n_slots: how many slots there are to share them.
        """
        seen = self._seen[number]
        if not seen:
            return 1
        wanted = min(int(self._target_seconds / max(self.seconds[number], 1e-9)), seen * _GROWTH)
        return max(1, min(wanted, -(-n_ready // n_slots)))
