"""The protocol between the dispatcher of a run and what stores the run: a run store.

    Dispatcher    ──> Keeper.begin, grow ──> tasks that are done already     Keeper.load ──> their values, when needed
                  ──> Keeper.values      (per reply)
    EventRecorder ──> Keeper.take        (entries of the event log, per batch)

The dispatcher knows only this protocol; `forgepar.store.writer` implements it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from forgepar.records.events import Event
from forgepar.records.ledger import Ledger
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.workflow.plan import IntArray, Plan, Tasks

EARLIER_RUN = -1  # in place of the task that caused others not to run


class TasksNotRun(NamedTuple):
    """Tasks that will not run.

    Attributes:
        at: when that became known, in seconds since the epoch.
        tasks: the numbers of the tasks.
        cause: the dependency that failed or was skipped, or the condition that chose the other branch; `EARLIER_RUN` if
            an earlier run completed them.
    """

    at: float
    tasks: IntArray
    cause: int


# An entry of the event log: an event; the tasks of one reply, which began and completed one after the other (their
# times, worker and sizes are in the ledger); or tasks that will not run.
Entry: TypeAlias = Event | Tasks | TasksNotRun


class Keeper(Protocol):
    """Stores a run while it runs, and has the values of earlier runs. It reports failures as warnings and never raises.

    Attributes:
        look_at: the latest time to call `beat`, in `time.perf_counter` seconds; inf: never.
    """

    look_at: float

    def begin(self, ledger: Ledger, arena: Arena) -> IntArray:
        """Store the start of the run; return the tasks that need not run, because their values are stored.

        Args:
            ledger: the columns of the run; the row of a task is filled before `take` gets its entry.
            arena: the shared memory with large values; `load` adds some.
        """

    def grow(self, plan: Plan) -> IntArray:
        """Continue with a larger plan; return those of the new tasks that need not run."""

    def taken_over(self) -> IntArray:
        """Return the tasks completed by a run that never ended: this run undoes them if it fails."""

    def load(self, task: int) -> Wire:
        """Return the value of a task that need not run."""

    def values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Store the values of tasks, before any of them may be freed; ``values`` may be longer than ``tasks``."""

    def take(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Store entries of the event log, each with the number of its first event."""

    def beat(self, now: float) -> None:
        """Write what is buffered, if `look_at` has passed."""


class NullKeeper:
    """The `Keeper` of a run that no store keeps."""

    look_at = math.inf

    def begin(self, ledger: Ledger, arena: Arena) -> IntArray:  # noqa: ARG002
        """Return no tasks."""
        return _NO_TASKS

    def grow(self, plan: Plan) -> IntArray:  # noqa: ARG002
        """Return no tasks."""
        return _NO_TASKS

    def taken_over(self) -> IntArray:
        """Return no tasks."""
        return _NO_TASKS

    def load(self, task: int) -> Wire:
        """Raise: earlier runs did no task of this one."""
        raise LookupError(task)

    def values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Do nothing."""

    def take(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Do nothing."""

    def beat(self, now: float) -> None:
        """Do nothing."""


_NO_TASKS: IntArray = np.empty(0, np.int32)
