"""Ready queues: which tasks are ready, and which of them run next."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from forgepar.scheduling.effects import Effect
from forgepar.workflow.plan import IntArray, Plan, Tasks


class ReadyQueue(Protocol):
    """Decides which tasks are ready, and in which order they are handed out."""

    @property
    def layer(self) -> int | None:
        """The current layer; None for a queue without layers."""

    def begin(self) -> list[Effect]:
        """Make the tasks that depend on nothing ready."""

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to hand out next and the number of ready tasks, or None if none is ready."""

    def take(self, most: int) -> Tasks:
        """Hand out up to ``most`` tasks of the head's template, in ascending order."""

    def put_back(self, template: int, tasks: Tasks) -> None:
        """Make tasks of one template ready again, before all others."""

    def park(self) -> None:
        """Set the head's tasks aside, so that other tasks become the head."""

    def unpark(self) -> None:
        """Make the tasks that were set aside ready again, before all others."""

    def settle(self, tasks: Tasks) -> list[Effect]:
        """Record that tasks will not run again, and make the tasks that waited for them ready."""

    def drop(self, skipped: NDArray[np.bool_], passed: IntArray | None = None) -> list[Effect]:
        """Exclude tasks that must never become ready. May be called before `begin`.

        Args:
            skipped: (n_tasks,) bool, all tasks excluded so far.
            passed: newly excluded tasks that others need not wait for. By default, their dependents are excluded too.
        """

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        """Set the expected duration of each task: (n_tasks,) seconds."""

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that appends tasks to the current one; see `Plan.spliced`."""


class ReturnableTasks:
    """Base class of ready queues: it keeps returned tasks and tasks that are set aside."""

    _plan: Plan

    def __init__(self) -> None:
        self._returned: list[tuple[int, Tasks]] = []
        self._n_returned = 0
        self._parked: list[tuple[int, Tasks]] = []

    def head(self) -> tuple[int, int] | None:
        raise NotImplementedError

    def take(self, most: int) -> Tasks:
        raise NotImplementedError

    def put_back(self, template: int, tasks: Tasks) -> None:
        self._returned.append((template, tasks))
        self._n_returned += len(tasks)

    def park(self) -> None:
        head = self.head()
        assert head is not None
        self._parked.append((head[0], self.take(self._plan.n_tasks)))

    def unpark(self) -> None:
        while self._parked:
            self.put_back(*self._parked.pop())

    def _take_returned(self, most: int) -> Tasks:
        template, tasks = self._returned.pop()
        if len(tasks) > most:
            self._returned.append((template, tasks[most:]))
            tasks = tasks[:most]
        self._n_returned -= len(tasks)
        return tasks
