"""Between the loop of a run and what keeps it: a run store writes down what is done, and has what earlier runs did.

    Dispatcher ──> Keeper.begin, grow ──> tasks that are done already     Keeper.load ──> their values, when needed
               ──> Keeper.values      (by the reply, as they come)
    Journal    ──> Keeper.take        (what was noted, by the batch)

The loop knows only this protocol; see `forgepar.recording` for the one who keeps runs in a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

from forgepar.events import Event
from forgepar.plan import IntArray, Plan, Tasks
from forgepar.result import Ledger
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire

EARLIER_RUN = -1  # in place of the task that others waited for


class NotRun(NamedTuple):
    """Tasks that will not run.

    Attributes:
        at: when that was known, seconds since the epoch.
        tasks: which.
        cause: the task that they waited for, or that decided against them; `EARLIER_RUN`: they are done already.
    """

    at: float
    tasks: IntArray
    cause: int


# What a run notes: an event; the tasks of one reply, which began and completed one after the other, and whose times,
# worker and size are in the ledger; tasks that will not run.
Entry: TypeAlias = Event | Tasks | NotRun


class Keeper(Protocol):
    """Keeps a run as it goes, and has what earlier runs did. What it cannot do it reports, and raises nothing.

    Attributes:
        look_at: when `beat` is to be called at the latest, `time.perf_counter` seconds; inf: never.
    """

    look_at: float

    def begin(self, ledger: Ledger, arena: Arena) -> IntArray:
        """Take note that the run begins; return the tasks that need not run, as their values can be had.

        Args:
            ledger: the columns of the run; those of a task are filled before `take` tells of it.
            arena: where large values are, and where `load` puts some.
        """

    def grow(self, plan: Plan) -> IntArray:
        """Go on with a plan that has more tasks; return those among the new ones that need not run."""

    def taken_over(self) -> IntArray:
        """Return those that need not run as a run did them which never completed: this one undoes them if it fails."""

    def load(self, task: int) -> Wire:
        """Return the value of a task that need not run."""

    def values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Take in what tasks returned, before any of it may be freed; ``values`` are as long as ``tasks`` or longer."""

    def take(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Take in what was noted, each with the number of its first event."""

    def beat(self, now: float) -> None:
        """Write what waits to be written, if it is time for that."""
