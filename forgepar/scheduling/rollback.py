"""Rollback: a pure state machine that undoes completed tasks after a run failed or was cancelled, and its report.

Layers are undone from the last to the first, and tasks of one layer in parallel. So a task is undone before the tasks
that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import error_text
from forgepar.scheduling.run_state import SecondOutcome, Status
from forgepar.values.exceptions import PicklableException, is_kind
from forgepar.version import public
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_tasks

# Which completed tasks to undo: all, those that a failed task depends on, none, or those for which a function of the
# task's name returns a true value.
Strategy: TypeAlias = Literal["all", "upstream", "none"] | Callable[[str], object]


@public
@dataclass(frozen=True)
class RollbackReport:
    """The outcome of a rollback.

    Attributes:
        compensated: names of the tasks that were undone, in the order in which they were undone.
        failed: by task name, the error that undoing the task raised. The effects of these tasks may remain.
        n_without: the number of tasks to undo that have no ``compensate``.
    """

    compensated: tuple[str, ...] = ()
    failed: dict[str, Exception] = field(default_factory=dict)
    n_without: int = 0
    _without: Callable[[], Iterable[str]] = field(default=tuple, repr=False, compare=False)

    def __reduce__(self) -> Any:
        failed = {name: PicklableException(error) for name, error in self.failed.items()}
        return _report, (self.compensated, failed, self.skipped)

    def __copy__(self) -> RollbackReport:
        return self  # it is immutable

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the tasks to undo that have no ``compensate``."""
        return tuple(self._without())

    @property
    def ok(self) -> bool:
        """Whether no task failed to be undone."""
        return not self.failed

    def __str__(self) -> str:
        text = f"{len(self.compensated)} compensated, {len(self.failed)} failed, {self.n_without} without compensation"
        return text + "".join(f"\n  {name}: {error_text(error)}" for name, error in self.failed.items())


def _report(compensated: tuple[str, ...], failed: dict[str, Exception], skipped: tuple[str, ...]) -> RollbackReport:
    return RollbackReport(compensated, failed, len(skipped), lambda: skipped)


class Rollback:
    """The tasks still to undo: hands them out and receives their outcomes, with the interface of `RunState`.

    Args:
        plan: the workflow.
        status: (n_tasks,) int8, the `Status` of each task.
        strategy: which completed tasks to undo. If it is a function that raises for a task, this task counts as one
            that could not be undone.
        failed: the tasks that failed.
    """

    def __init__(self, plan: Plan, status: NDArray[np.int8], strategy: Strategy, failed: Sequence[int]) -> None:
        self._plan = plan
        self.attempts: dict[int, int] = {}
        self.halted = False
        self._ended_by: Exception | None = None
        self._waiting: set[int] = set()
        self.errors: dict[int, Exception] = {}
        self.compensated: list[int] = []
        chosen = self._choose(status, strategy, failed)
        undo = np.full(len(plan.templates), -1, np.int32)
        for base, number in plan.stand_ins.undo.items():
            undo[base] = number
        template = undo[plan.template_of]
        self._template = template
        self._without: IntArray = np.flatnonzero(chosen & (template < 0)).astype(np.int32)
        self._layers = _by_layer(plan, np.flatnonzero(chosen & (template >= 0)).astype(np.int32), template)
        self._ready: list[tuple[int, Tasks]] = []
        self._out: set[int] = set()
        self._n_ready = self._unsettled = 0
        self._advance()

    @property
    def finished(self) -> bool:
        """Whether each task to undo was undone or failed to be."""
        return not self._unsettled and not self._layers

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to undo next and the number of ready tasks, or None if none is ready."""
        return (self._ready[-1][0], self._n_ready) if self._ready else None

    def take(self, most: int) -> Tasks:
        """Hand out up to ``most`` tasks of the head's template."""
        template, tasks = self._ready.pop()
        if len(tasks) > most:
            self._ready.append((template, tasks[most:]))
            tasks = tasks[:most]
        self._n_ready -= len(tasks)
        self._out.update(map(int, tasks))
        return tasks

    def put_back(self, template: int, tasks: Tasks) -> None:
        """Return tasks that were handed out and did not start. After `give_up`, they count as failed."""
        self._out.difference_update(map(int, tasks))
        if self._ended_by is not None:
            self.errors |= dict.fromkeys(map(int, tasks), self._ended_by)
            self._unsettled -= len(tasks)
            return
        self._ready.append((template, tasks))
        self._n_ready += len(tasks)

    def completed(self, tasks: Tasks) -> None:
        """Record that tasks were undone.

        Raises:
            SecondOutcome: one of the tasks is not handed out.
        """
        self._end(tasks)
        self.compensated += tasks if isinstance(tasks, range) else tasks.tolist()
        self._settle(len(tasks))

    def failed(self, task: int, error: Exception) -> None:
        """Record that a task could not be undone. The other tasks are still undone.

        Raises:
            SecondOutcome: the task is not handed out.
        """
        self._end(range(task, task + 1))
        self.errors[task] = error
        self._settle(1)

    def tries_again(self, task: int, error: Exception) -> float | None:
        """Record a failed attempt to undo a task; return the seconds to wait before the next, None if there is none.

        Raises:
            SecondOutcome: the task is not handed out.
        """
        options = self._plan.stand_ins.undo_options[int(self._template[task])]
        n_tried = self.attempts.get(task, 1)
        if self._ended_by is not None or n_tried > options.retries or not is_kind(error, options.retry_on):
            return None
        self._end(range(task, task + 1))
        self.attempts[task] = n_tried + 1
        self._waiting.add(task)
        return options.backoff.wait_seconds(n_tried)

    def retry(self, task: int) -> None:
        """Make a task ready for its next attempt."""
        if task in self._waiting:
            self._waiting.remove(task)
            self.put_back(int(self._template[task]), range(task, task + 1))

    def give_up(self, error: Exception) -> None:
        """Hand out no more tasks because the time is over. All tasks that are not undone fail with ``error``."""
        self._ended_by = error
        self.halted = True
        left = [*self._ready, *((0, [task]) for task in sorted(self._waiting))]
        left += [group for layer in reversed(self._layers) for group in layer]
        for _, tasks in left:
            self.errors |= dict.fromkeys(map(int, tasks), error)
        self._ready.clear()
        self._layers.clear()
        self._waiting.clear()
        self._n_ready = 0
        self._unsettled = len(self._out)

    def park(self) -> None:
        """Do nothing: compensations declare no memory."""

    def unpark(self) -> None:
        """Do nothing, for the same reason."""

    def report(self) -> RollbackReport:
        """Return the report of the rollback."""
        plan, without = self._plan, self._without
        return RollbackReport(
            tuple(map(plan.name, self.compensated)),
            {plan.name(task): error for task, error in self.errors.items()},
            len(without),
            lambda: map(plan.name, without.tolist()),
        )

    def _choose(self, status: NDArray[np.int8], strategy: Strategy, failed: Sequence[int]) -> NDArray[np.bool_]:
        """Return the completed tasks that a strategy selects: (n_tasks,) bool."""
        completed: NDArray[np.bool_] = status == Status.COMPLETED
        if strategy == "all":
            return completed
        if strategy == "upstream":
            return completed & self._plan.graph.reversed().descendants(list(failed))
        chosen = np.zeros(len(completed), np.bool_)
        if callable(strategy):
            for task in np.flatnonzero(completed).tolist():
                try:
                    chosen[task] = bool(strategy(self._plan.name(task)))
                except Exception as error:
                    self.errors[task] = error
        return chosen

    def _end(self, tasks: Tasks) -> None:
        ended = set(map(int, tasks))
        if not ended <= self._out:
            name = self._plan.name(min(ended - self._out))
            raise SecondOutcome(f"Got an outcome of undoing task {name!r}, which is not handed out.")
        self._out -= ended

    def _settle(self, n_tasks: int) -> None:
        self._unsettled -= n_tasks
        if not self._unsettled:
            self._advance()

    def _advance(self) -> None:
        if self._layers and self._ended_by is None:
            for template, tasks in self._layers.pop():
                self.put_back(template, tasks)
            self._unsettled = self._n_ready


def _by_layer(plan: Plan, tasks: IntArray, template: IntArray) -> list[list[tuple[int, Tasks]]]:
    """Split tasks into layers, in ascending order, and each layer into groups of one template."""
    if not len(tasks):
        return []
    order = np.lexsort((tasks, template[tasks], plan.layers[tasks]))
    tasks = tasks[order]
    layers, templates = plan.layers[tasks], template[tasks]
    cuts = np.flatnonzero((np.diff(layers) != 0) | (np.diff(templates) != 0)) + 1
    found: list[list[tuple[int, Tasks]]] = []
    last = -1
    for group in np.split(tasks, cuts):
        layer = int(plan.layers[group[0]])
        if layer != last:
            found.append([])
            last = layer
        found[-1].append((int(template[group[0]]), as_tasks(group)))
    return found
