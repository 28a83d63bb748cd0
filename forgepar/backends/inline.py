"""This process as the only worker: for debugging, for runs inside a worker, and as the reference for other backends.

It runs the workers' code on the same messages, so values that cannot be pickled fail here too, and no task sees the
objects of another. Breakpoints, prints and profilers work as in any script.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from forgepar.backends.base import Joined, Notice, OutputNotice, Traits
from forgepar.backends.messages import Batch
from forgepar.backends.worker import Worker
from forgepar.backends.worker_board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.system.forking import fork_safe
from forgepar.values import in_place
from forgepar.values.arena import Arena
from forgepar.values.arena_folders import open_arena, remove_arena
from forgepar.workflow import context as contexts


class InlineBackend:
    """One slot, in this process.

    Args:
        budget: most bytes of large values in shared memory; None: half of the available memory.

    Example:
        >>> backend = InlineBackend()
        >>> backend.open()
        >>> backend.close()
    """

    name = "inline"
    traits = Traits(ends_workers=False, may_run_here=True)
    n_slots = 1

    arena: Arena

    def __init__(self, budget: int | None = None) -> None:
        self.lock = fork_safe(threading.RLock())
        self._budget = budget
        self._waiting: deque[Batch] = deque()
        self._integers = memoryview(bytearray(64)).cast("q")
        self._is_open = False

    def open(self, n_wanted: int = 1) -> None:  # noqa: ARG002
        """Create the arena."""
        if self._is_open:
            self._integers[CALLED_OFF] = 0
            return
        self.arena = open_arena(budget=self._budget)
        board = Board.create(str(self.arena.folder / "board"), 1)
        self._run = board.run
        self._integers, self._times = board.integers(0), board.floats(0)
        self._worker = Worker(0, self.arena, board, interruptible=True)
        self._is_open = True

    def joined(self) -> Sequence[Joined]:
        """Return the one slot."""
        return [Joined(0, os.getpid())]

    def send(self, slot: int, batch: Batch) -> None:  # noqa: ARG002
        """Keep a batch for `wait` to run."""
        self._waiting.append(batch)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Run the next batch and return its replies; if there is none, sleep."""
        if not self._waiting:
            time.sleep(timeout or 0.0)
            return []
        with in_place.here(self.arena), contexts.here(self._worker.context):
            return list(self._worker.run(self._waiting.popleft()))

    def rest(self) -> Sequence[OutputNotice]:
        """Return nothing: output here is not buffered."""
        return ()

    def wake(self) -> None:
        """Do nothing: `wait` blocks only while a task runs."""

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Publish the progress of the run to tasks."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Publish to tasks whether the run was cancelled."""
        self._integers[CALLED_OFF] = is_off

    def position(self, slot: int) -> int:  # noqa: ARG002
        """Return the mark of the current task, or of the last one."""
        mark: int = self._integers[POSITION]
        return mark

    def may_be_at(self, slot: int) -> int | None:
        """Return the mark of the current task, since the slot sees a limit at once."""
        return self.position(slot)

    def withdraw(self, slot: int) -> None:
        """Do nothing: the slot replies without being asked."""

    def limit(self, slot: int, mark: int) -> None:  # noqa: ARG002
        """Forbid the slot to begin the task of this mark or a later one."""
        self._integers[LIMIT] = mark

    def started(self, slot: int) -> float:  # noqa: ARG002
        """Return when the last task began."""
        return self._times[STARTED]

    def where(self, slots: Sequence[int]) -> dict[int, str]:  # noqa: ARG002
        """Return nothing: no task runs while this is called."""
        return {}

    def n_given(self, slot: int) -> int:  # noqa: ARG002
        """Return 0: there is no worker to recycle."""
        return 0

    def renew(self, slot: int) -> None:
        """Do nothing: there is no worker to recycle."""

    def terminate(self, slot: int) -> None:
        """Do as `kill` does."""
        self.kill(slot)

    def kill(self, slot: int) -> None:  # noqa: ARG002
        """Forget the waiting batches: the only process is the caller's own."""
        self._waiting.clear()

    def close(self) -> None:
        """Remove the arena."""
        if self._is_open:
            self._is_open = False
            self._waiting.clear()
            remove_arena(self.arena)
