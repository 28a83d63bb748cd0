"""The ready queue of the schedule "eager": a task is ready as soon as its dependencies are done."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from forgepar.graph import longest_remaining
from forgepar.scheduling.effects import Effect
from forgepar.scheduling.ready_queue import ReturnableTasks
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_tasks
from forgepar.workflow.taskset import distinct

_READY = -1  # instead of the number of open dependencies: the task was made ready once


class EagerQueue(ReturnableTasks):
    """A queue of all tasks with finished dependencies, the longest remaining path first.

    List scheduling (R. L. Graham, 1969) with the longest path to the end as priority (T. C. Hu, 1961). A step costs
    O(log n) per task and O(1) per edge; `weigh` costs O(n + m).
    """

    layer: int | None = None

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self._waits = plan.graph.in_degrees().astype(np.int32)
        self._ready: list[tuple[float, int]] = []
        self._priority = longest_remaining(plan.graph, np.ones(plan.n_tasks))

    def grow(self, plan: Plan) -> None:
        n = self._plan.n_tasks
        self._plan = plan
        self._waits = np.append(self._waits, plan.graph.in_degrees()[n:].astype(np.int32))
        self._priority = np.append(self._priority, np.zeros(plan.n_tasks - n))

    def begin(self) -> list[Effect]:
        self._make_ready(np.flatnonzero(self._waits == 0))
        return []

    def head(self) -> tuple[int, int] | None:
        ready = len(self._ready) + self._n_returned
        if not ready:
            return None
        if self._returned:
            return self._returned[-1][0], ready
        return int(self._plan.template_of[self._ready[0][1]]), ready

    def take(self, most: int) -> Tasks:
        if self._returned:
            return self._take_returned(most)
        ready, template_of = self._ready, self._plan.template_of
        taken = [heapq.heappop(ready)[1]]
        template = template_of[taken[0]]
        while len(taken) < most and ready and template_of[ready[0][1]] == template:
            taken.append(heapq.heappop(ready)[1])
        return as_tasks(np.array(sorted(taken), np.int32))

    def settle(self, tasks: Tasks) -> list[Effect]:
        graph, waits = self._plan.graph, self._waits
        if len(tasks) == 1:
            after = graph.successors(int(tasks[0]))
        else:
            after = np.concatenate([graph.successors(task) for task in _numbers(tasks)])
        if len(after):
            np.subtract.at(waits, after, 1)
            self._make_ready(distinct(after[waits[after] == 0]))
        return []

    def drop(self, skipped: NDArray[np.bool_], passed: IntArray | None = None) -> list[Effect]:
        self._waits[skipped] = 2 * self._plan.n_tasks + 1  # more than the number of tasks that can be settled or passed
        return [] if passed is None else self.settle(passed)

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        self._priority = longest_remaining(self._plan.graph, seconds)
        self._ready = [(-float(self._priority[task]), task) for _, task in self._ready]
        heapq.heapify(self._ready)

    def _make_ready(self, tasks: NDArray[np.integer]) -> None:
        self._waits[tasks] = _READY
        for priority, task in zip((-self._priority[tasks]).tolist(), tasks.tolist(), strict=True):
            heapq.heappush(self._ready, (priority, task))


def _numbers(tasks: Tasks) -> Iterable[int]:
    return tasks if isinstance(tasks, range) else tasks.tolist()
