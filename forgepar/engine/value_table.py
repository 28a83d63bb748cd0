"""The values of a running workflow, each as it travels, until its last consumer is done."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from forgepar.engine.batches import BatchWriter
from forgepar.records.outputs import Outputs
from forgepar.scheduling.run_state import RunPolicy, Status, kept_tasks
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment
from forgepar.values.segments import names_of
from forgepar.workflow.plan import IntArray, Plan, Tasks
from forgepar.workflow.taskset import distinct


class ValueTable:
    """Keeps values with reference counts, and frees each when its last consumer is done and no output needs it.

    Args:
        plan: the workflow.
        policy: the run's rules; they name the outputs.
        batch_writer: is notified of freed segments.
        arena: where large values are.

    Attributes:
        values: the value of each task so far.
        has_coded: whether any value was more than a scalar; until then there is nothing to free.
        unloaded: tasks that an earlier run did, with values that may be needed but are not loaded yet.
    """

    def __init__(self, plan: Plan, policy: RunPolicy, batch_writer: BatchWriter, arena: Arena) -> None:
        self.values: list[Wire] = [None] * plan.n_tasks
        self.has_coded = False
        self.unloaded: set[int] = set()
        self._batch_writer = batch_writer
        self._policy = policy
        self._arena = arena
        self._kept = kept_tasks(plan, policy)
        self._held = self._kept if policy.rollback == "none" else self._kept | _undoable(plan)
        self._takers = np.bincount(plan.references, minlength=plan.n_tasks)

    def restore(self, tasks: IntArray, plan: Plan) -> None:
        """Note that an earlier run did these tasks: they consume no values, and theirs are loaded when needed."""
        done = np.zeros(plan.n_tasks, np.bool_)
        done[tasks] = True
        takes_nothing = np.repeat(done, np.diff(plan.reference_start))
        self._takers -= np.bincount(plan.references[takes_nothing], minlength=plan.n_tasks)
        self.unloaded.update(tasks[(self._takers[tasks] > 0) | self._held[tasks]].tolist())

    def load(self, tasks: Tasks, load: Callable[[int], Wire]) -> None:
        """Load those values that some tasks take and earlier runs made."""
        for task in self.unloaded.intersection(self._batch_writer.references(tasks).tolist()):
            self.load_one(task, load)

    def load_one(self, task: int, load: Callable[[int], Wire]) -> None:
        """Load the value of a task that an earlier run did."""
        self.unloaded.remove(task)
        self.values[task] = value = load(task)
        self.has_coded |= type(value) is tuple

    def put(self, slot: int, tasks: Tasks, values: list[Wire]) -> None:
        """Store what tasks returned on a slot, and free values that they were the last to consume."""
        if isinstance(tasks, range):
            self.values[tasks.start : tasks.stop] = values[: len(tasks)]
        else:
            for task, value in zip(tasks.tolist(), values, strict=False):
                self.values[task] = value
        if tuple in set(map(type, values)):
            self.has_coded = True
            for task, value in zip(tasks, values, strict=False):
                if type(value) is tuple and not is_segment(value):
                    self._batch_writer.keep(slot, int(task), value)
        if self.has_coded:
            self._release(self._count_takers(tasks))

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that has more tasks, one of which stands for an earlier task; see `Plan.spliced`.

        Raises:
            UnpicklableCallable: a callable came from a worker, but cannot be pickled here; nothing was changed.
        """
        self._batch_writer.grow(plan)
        policy = self._policy
        n = len(self.values)
        task, last = next(reversed(plan.alias.items()))
        self.values += [None] * (plan.n_tasks - n)
        self._kept = np.append(self._kept, np.full(plan.n_tasks - n, policy.outputs == "all"))
        self._kept[last] |= self._kept[task]
        self._held = self._kept if policy.rollback == "none" else self._kept | _undoable(plan)
        self._takers = np.append(self._takers, np.bincount(plan.references, minlength=plan.n_tasks)[n:])
        self._takers[last], self._takers[task] = self._takers[task], 0

    def put_one(self, task: int, value: Wire) -> None:
        """Store a value that no worker made."""
        self.values[task] = value
        if type(value) is tuple:
            self.has_coded = True
        if self.has_coded:
            self._release(self._count_takers(range(task, task + 1)))

    def pass_over(self, tasks: IntArray) -> None:
        """Free values that only these tasks, which are skipped, still had to consume."""
        if self.has_coded:
            for task in tasks.tolist():
                self._release(self._count_takers(range(task, task + 1)))

    def free_strays(self, pid: int) -> None:
        """Free segments that a dead worker had begun to write."""
        if self.has_coded:
            named = (names_of(value) for value in self.values if is_segment(value))
            self._arena.free_strays(pid, frozenset(name for names in named for name in names))

    def outputs(self, status: NDArray[np.int8], load: Callable[[int], Wire] | None = None) -> Outputs:
        """Return the values that the result keeps, and free all others."""
        if load is not None:
            for task in [task for task in self.unloaded if self._kept[task] and status[task] == Status.CACHED]:
                self.load_one(task, load)
        has_value = (status == Status.COMPLETED) | (status == Status.COMPENSATED) | (status == Status.CACHED)
        outputs = Outputs(self.values, self._kept & has_value, self._arena)
        if self.has_coded:
            for value in filter(is_segment, self.values):
                self._arena.free(value, keep=False)  # the outputs are mapped
        return outputs

    def _count_takers(self, done: Tasks) -> NDArray[np.int32]:
        """Decrement the counts of what completed tasks consumed; return the tasks with values that can be freed."""
        taken = self._batch_writer.references(done)
        np.subtract.at(self._takers, taken, 1)
        touched = distinct(np.concatenate([taken, np.asarray(done, np.int32)]))
        free: NDArray[np.int32] = touched[(self._takers[touched] <= 0) & ~self._held[touched]]
        return free

    def _release(self, tasks: NDArray[np.int32]) -> None:
        """Free coded values; to search for scalars would cost more than they take."""
        for task in tasks.tolist():
            value = self.values[task]
            if type(value) is tuple:
                self.values[task] = None
                if is_segment(value):
                    self._arena.free(value)
                    self._batch_writer.freed(value)


def _undoable(plan: Plan) -> NDArray[np.bool_]:
    """Return the tasks with a compensation, which gets their value."""
    undoable = np.zeros(len(plan.templates), np.bool_)
    undoable[list(plan.stand_ins.undo)] = True
    found: NDArray[np.bool_] = undoable[plan.template_of]
    return found
