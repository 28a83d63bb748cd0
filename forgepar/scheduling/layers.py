"""The ready queue of the schedule "layers": a layer starts when every task of the previous one is settled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forgepar.scheduling.effects import Effect, LayerCompleted, LayerStarted
from forgepar.scheduling.ready_queue import ReturnableTasks
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_tasks


class LayeredQueue(ReturnableTasks):
    """A queue of one layer at a time, in the order of the plan within a layer."""

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
        # Single elements are read through memoryviews: indexing a numpy array takes three times as long, or more.
        self._order_at, self._group_end_at, self._template_at = (
            column.data for column in (plan.order, plan.group_end, plan.template_of)
        )

    def grow(self, plan: Plan) -> None:
        # The new tasks are all in later layers, so the positions of the layers up to this one do not change.
        if self._skipped is not None:
            self._skipped = np.append(self._skipped, np.zeros(plan.n_tasks - self._plan.n_tasks, np.bool_))
        self._read(plan)

    def begin(self) -> list[Effect]:
        return self._advance([])

    def head(self) -> tuple[int, int] | None:
        ready = self._end - self._at + self._n_returned
        if not ready:
            return None
        if self._returned:
            return self._returned[-1][0], ready
        return self._template_at[self._order_at[self._at]], ready

    def take(self, most: int) -> Tasks:
        if self._returned:
            return self._take_returned(most)
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
        self._skipped = skipped  # they are all in later layers
        return []

    def weigh(self, seconds: NDArray[np.float64]) -> None:
        """Do nothing: durations do not change the order of layers."""

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


def _by_template(plan: Plan, tasks: IntArray) -> list[tuple[int, Tasks]]:
    """Split tasks, given in the plan's order, into groups of one template."""
    templates = plan.template_of[tasks]
    cuts = np.flatnonzero(np.diff(templates)) + 1
    groups = np.split(tasks, cuts) if len(tasks) else []
    return [(int(plan.template_of[group[0]]), as_tasks(group)) for group in groups]
