"""This process as the only worker: for debugging, for runs inside a worker, and as the reference for the others.

It runs the workers' own code on the same messages, so what cannot travel fails here too, and no task sees another's
objects. Breakpoints, prints and profilers work as in any script.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence

from forgepar import contexts
from forgepar.backends.base import Joined, Notice, Told
from forgepar.backends.board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.backends.wire import Batch
from forgepar.backends.worker import Worker
from forgepar.values import inplace
from forgepar.values.arena import Arena
from forgepar.values.folders import open_arena, remove_arena


class InlineBackend:
    """One slot, in this process.

    Args:
        budget: most bytes of large values in shared memory; None: half of the memory that is available.

    Example:
        >>> backend = InlineBackend()
        >>> backend.open()
        >>> backend.close()
    """

    name = "inline"
    ends_workers = False
    n_slots = 1

    arena: Arena

    def __init__(self, budget: int | None = None) -> None:
        self._budget = budget
        self._waiting: deque[Batch] = deque()
        self._words = memoryview(bytearray(64)).cast("q")
        self._is_open = False

    def open(self, n_wanted: int = 1) -> None:  # noqa: ARG002
        """Make the arena."""
        if self._is_open:
            self._words[CALLED_OFF] = 0
            return
        self.arena = open_arena(budget=self._budget)
        board = Board.create(str(self.arena.folder / "board"), 1)
        self._run = board.run
        self._words, self._times = board.integers(0), board.floats(0)
        self._worker = Worker(0, self.arena, board, interruptible=True)
        self._is_open = True

    def joined(self) -> Sequence[Joined]:
        """Tell the one slot."""
        return [Joined(0, os.getpid())]

    def send(self, slot: int, batch: Batch) -> None:  # noqa: ARG002
        """Keep a batch for `wait` to run."""
        self._waiting.append(batch)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Run the next batch, and return when it is done; where there is none, let the time pass."""
        if not self._waiting:
            time.sleep(timeout or 0.0)
            return []
        with inplace.here(self.arena), contexts.here(self._worker.context):
            return list(self._worker.run(self._waiting.popleft()))

    def rest(self) -> Sequence[Told]:
        """Return nothing: what is printed here is not held back."""
        return ()

    def wake(self) -> None:
        """Do nothing: between batches this is awake, in one it is the task's turn."""

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Let tasks know, if they ask, how the run stands."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Let the task that runs know, if it asks."""
        self._words[CALLED_OFF] = is_off

    def position(self, slot: int) -> int:  # noqa: ARG002
        """Return the mark of the task last run."""
        mark: int = self._words[POSITION]
        return mark

    def limit(self, slot: int, mark: int) -> None:  # noqa: ARG002
        """Forbid the task of this mark and whatever comes behind it."""
        self._words[LIMIT] = mark

    def started(self, slot: int) -> float:  # noqa: ARG002
        """Tell when the last task began."""
        return self._times[STARTED]

    def where(self, slots: Sequence[int]) -> dict[int, str]:  # noqa: ARG002
        """Return nothing: while anybody asks, no task runs."""
        return {}

    def n_given(self, slot: int) -> int:  # noqa: ARG002
        """Count nothing: there is no worker to wear out."""
        return 0

    def renew(self, slot: int) -> None:
        """Do nothing, for the same reason."""

    def terminate(self, slot: int) -> None:
        """Do as `kill` does."""
        self.kill(slot)

    def kill(self, slot: int) -> None:  # noqa: ARG002
        """Forget what is waiting: there is no process to end but the caller's own."""
        self._waiting.clear()

    def close(self) -> None:
        """Remove the arena."""
        if self._is_open:
            self._is_open = False
            self._waiting.clear()
            remove_arena(self.arena)
