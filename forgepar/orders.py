"""Which tasks are ready, and in which order they are handed out: by layers, or each as soon as it can be."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from forgepar.columns import distinct
from forgepar.effects import Effect, LayerCompleted, LayerStarted
from forgepar.graph import longest_remaining
from forgepar.plan import IntArray, Plan, Tasks, as_tasks

_READY = -1  # in place of how many tasks one waits for: it was made ready, once


class Order(Protocol):
    """Decides which tasks are ready, and in which order they are handed out."""

    @property
    def layer(self) -> int | None:
        """The layer that runs; None where there is none."""

    def begin(self) -> list[Effect]:
        """Make ready what waits for nothing."""

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to hand out next, and how many tasks are ready; None if none is."""

    def take(self, most: int) -> Tasks:
        """Hand out up to ``most`` tasks of the head's template, ascending."""

    def put_back(self, template: int, tasks: Tasks) -> None:
        """Make tasks of one template ready again, before all others."""

    def park(self) -> None:
        """Set the head's tasks aside, so that others are the head."""

    def unpark(self) -> None:
        """Make ready again what was set aside, before all others."""

    def settle(self, tasks: Tasks) -> list[Effect]:
        """Note that tasks will not run again, and make ready what waited for them."""

    def drop(self, skipped: NDArray[np.bool_], passed: IntArray | None = None) -> list[Effect]:
        """Leave out tasks that are never to be ready; it may be called before `begin`.

        Args:
            skipped: (n_tasks,) all of them so far.
            passed: those newly among them that others need not wait for; by default others are all left out, too.
        """

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        """Take in how long each task is believed to take."""

    def grow(self, plan: Plan) -> None:
        """Go on with a plan that has more tasks behind those of the last one; see `Plan.spliced`."""


class _Returnable:
    """What both orders do with tasks that were handed out and came back, and with those that are set aside."""

    _plan: Plan

    def __init__(self) -> None:
        self._back: list[tuple[int, Tasks]] = []
        self._n_back = 0
        self._parked: list[tuple[int, Tasks]] = []

    def head(self) -> tuple[int, int] | None:
        raise NotImplementedError

    def take(self, most: int) -> Tasks:
        raise NotImplementedError

    def put_back(self, template: int, tasks: Tasks) -> None:
        self._back.append((template, tasks))
        self._n_back += len(tasks)

    def park(self) -> None:
        head = self.head()
        assert head is not None
        self._parked.append((head[0], self.take(self._plan.n_tasks)))

    def unpark(self) -> None:
        while self._parked:
            self.put_back(*self._parked.pop())

    def _take_back(self, most: int) -> Tasks:
        template, tasks = self._back.pop()
        if len(tasks) > most:
            self._back.append((template, tasks[most:]))
            tasks = tasks[:most]
        self._n_back -= len(tasks)
        return tasks


class Layered(_Returnable):
    """Layer by layer, with a barrier between; in the order of the plan within one."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._read(plan)
        self._layer = -1
        self._at = self._end = 0
        self._n_tasks = self._unsettled = 0
        self._skipped: NDArray[np.bool_] | None = None

    @property
    def layer(self) -> int | None:
        return max(self._layer, 0)

    def _read(self, plan: Plan) -> None:
        self._plan = plan
        self._starts = plan.layer_start
        self._order = plan.order
        # Single elements are read through these: indexing a numpy array costs three times as much, more when cold.
        self._order_at, self._group_end_at, self._template_at = (
            column.data for column in (plan.order, plan.group_end, plan.template_of)
        )

    def grow(self, plan: Plan) -> None:
        # The layers up to this one are what they were, and so is their place in the order.
        if self._skipped is not None:
            self._skipped = np.append(self._skipped, np.zeros(plan.n_tasks - self._plan.n_tasks, np.bool_))
        self._read(plan)

    def begin(self) -> list[Effect]:
        return self._advance([])

    def head(self) -> tuple[int, int] | None:
        ready = self._end - self._at + self._n_back
        if not ready:
            return None
        if self._back:
            return self._back[-1][0], ready
        return self._template_at[self._order_at[self._at]], ready

    def take(self, most: int) -> Tasks:
        if self._back:
            return self._take_back(most)
        at = self._at
        self._at = min(at + most, self._group_end_at[at])
        if self._at == at + 1:
            task = self._order_at[at]
            return range(task, task + 1)
        return as_tasks(self._order[at : self._at])

    def settle(self, tasks: Tasks) -> list[Effect]:
        self._unsettled -= len(tasks)
        if self._unsettled:
            return []
        return self._advance([LayerCompleted(self._layer, self._n_tasks)])

    def drop(self, skipped: NDArray[np.bool_], passed: IntArray | None = None) -> list[Effect]:  # noqa: ARG002
        self._skipped = skipped  # they are all in layers to come
        return []

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        """Durations do not change the order of layers."""

    def _advance(self, effects: list[Effect]) -> list[Effect]:
        """Begin the next layer that has a task to run."""
        while self._layer + 1 < len(self._starts) - 1:
            self._layer += 1
            self._at, self._end = self._starts[self._layer], self._starts[self._layer + 1]
            self._n_tasks = self._end - self._at
            if self._skipped is not None:
                self._leave_out_skipped(self._skipped)
            self._unsettled = self._n_tasks
            if self._n_tasks:
                return [*effects, LayerStarted(self._layer, self._n_tasks)]
        return effects

    def _leave_out_skipped(self, skipped: NDArray[np.bool_]) -> None:
        tasks = self._order[self._at : self._end]
        tasks = tasks[~skipped[tasks]]
        self._n_tasks, self._at = len(tasks), self._end
        for template, group in reversed(_by_template(self._plan, tasks)):
            self.put_back(template, group)


class Eager(_Returnable):
    """Each task as soon as what it waits for is done; the longest remaining path first.

    List scheduling by the heaviest path to the end, R. L. Graham (1969) with the priorities of T. C. Hu (1961). A step
    costs O(log n) a task and O(1) an edge; weighing anew costs O(n + m).
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
        ready = len(self._ready) + self._n_back
        if not ready:
            return None
        if self._back:
            return self._back[-1][0], ready
        return int(self._plan.template_of[self._ready[0][1]]), ready

    def take(self, most: int) -> Tasks:
        if self._back:
            return self._take_back(most)
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
        self._waits[skipped] = 2 * self._plan.n_tasks + 1  # more than can ever be done or passed over
        return [] if passed is None else self.settle(passed)

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        self._priority = longest_remaining(self._plan.graph, seconds)
        self._ready = [(-float(self._priority[task]), task) for _, task in self._ready]
        heapq.heapify(self._ready)

    def _make_ready(self, tasks: NDArray[np.integer]) -> None:
        self._waits[tasks] = _READY
        for priority, task in zip((-self._priority[tasks]).tolist(), tasks.tolist(), strict=True):
            heapq.heappush(self._ready, (priority, task))


def _by_template(plan: Plan, tasks: IntArray) -> list[tuple[int, Tasks]]:
    """Split tasks that are in the plan's order into those of one template each."""
    templates = plan.template_of[tasks]
    cuts = np.flatnonzero(np.diff(templates)) + 1
    groups = np.split(tasks, cuts) if len(tasks) else []
    return [(int(plan.template_of[group[0]]), as_tasks(group)) for group in groups]


def _numbers(tasks: Tasks) -> Iterable[int]:
    return tasks if isinstance(tasks, range) else tasks.tolist()
