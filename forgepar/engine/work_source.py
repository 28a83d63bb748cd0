"""What the slot scheduler asks of those that have work for it, and what it reports to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, TypeAlias

from forgepar.backends.base import Joined, Lost
from forgepar.backends.messages import Batch, Reply
from forgepar.engine.in_flight import Flight
from forgepar.errors import TaskError

# Tasks as a source hands them out: a range, an array or a list. int() of one is its number.
Work: TypeAlias = Any


class WorkSource(Protocol):
    """What may run, and what becomes of it. All calls come from the thread of the `SlotScheduler`."""

    @property
    def alone(self) -> Collection[int]:
        """Templates whose tasks get a batch each."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is handed out any more."""

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to hand out next, and how many tasks are ready; None if none is."""

    def kind(self, template: int) -> int:
        """Return the number by which `Durations` knows the tasks of the head's template."""

    def take(self, most: int) -> Work:
        """Hand out up to ``most`` tasks of the head's template; none if all of them were cancelled."""

    def put_back(self, template: int, tasks: Work) -> None:
        """Take back tasks that were handed out and did not begin."""

    def park(self) -> None:
        """Set the head's tasks aside until `unpark`: there is no memory for them now, but there may be for others."""

    def unpark(self) -> None:
        """Make ready again what was set aside."""

    def message(self, slot: int, number: int, template: int, tasks: Work) -> Batch:
        """Return the batch of these tasks for a slot."""

    def drops(self, slot: int) -> Batch | None:
        """Return a batch that names what a slot without work is to unmap; None if there is nothing."""

    def forget(self, slot: int) -> None:
        """Note that a slot gets a new worker, or a batch must bring all it needs: the worker holds nothing."""

    def settle(self, slot: int, template: int, tasks: Work, reply: Reply) -> None:
        """Take in the outcomes of tasks; of the last one a failure, if the reply has one."""

    def failed(self, slot: int, template: int, task: Any, error: Exception) -> None:
        """Take in that a task failed without a reply: its worker died or was killed for it."""

    def repeated(self, task: Any, lost: Lost, *, was_at: bool) -> None:
        """Note that a task runs again as its worker was lost before its outcome was known.

        Args:
            task: the task; `put_back` follows.
            lost: the worker.
            was_at: whether the worker is known to have been at this task.
        """

    def interrupted(self, task: Any, lost: Lost) -> None:
        """Note that a worker was lost while it ran this task; `failed` or `repeated` follows."""

    def joined(self, joined: Joined) -> None:
        """Note that a slot has a worker."""

    def died(self, lost: Lost, task: Any | None, *, was_killed: bool) -> None:
        """Note that a worker ended, and which task it ran, if any; free what it had begun to write."""

    def killing(self, slot: int, task: int, error: TaskError) -> None:
        """Note that a worker is about to be ended as its task takes too long or too much memory."""

    def memory_is_low(self) -> None:
        """Note that little is handed out until the machine has more memory available."""

    def has_effects(self, flight: Flight) -> bool:
        """Return whether the tasks of a batch must not run twice."""

    def name(self, task: int) -> str:
        """Return a task's name."""
