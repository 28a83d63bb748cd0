"""Shapes that many workflows have, declared in one call; each is built from `Workflow.add` and `Workflow.map` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import DuplicateTaskName, WorkflowError
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.tasks import Task, task
from forgepar.workflow import Engine, TemplateRow, Workflow

# A task to be: a function that takes nothing, or a tuple of a function and its arguments.
Call: TypeAlias = Callable[..., Any] | tuple[Any, ...]


def sequence(workflow: Workflow, value: Any, *steps: Callable[..., Any]) -> TaskHandle:
    """Declare a chain: each step gets the value of the one before.

    Args:
        workflow: where to declare it.
        value: what the first step gets: a handle, or any argument.
        *steps: functions of one argument.

    Returns:
        The handle of the last step.

    Raises:
        WorkflowError: there is no step.

    Example:
        >>> wf = Workflow()
        >>> last = sequence(wf, " 7 ", str.strip, int, abs)
        >>> wf.run(backend="inline")[last]
        7
    """
    if not steps:
        raise WorkflowError("sequence() has no steps. Give it functions of one argument.")
    for step in steps:
        value = workflow.add(step, value)
    last: TaskHandle = value
    return last


@dataclass(frozen=True)
class ParallelTasks:
    """Several tasks as one: they run side by side, and the first that fails ends the run.

    Attributes:
        calls: functions that take nothing, or tuples of a function and its arguments, which may hold handles.

    Example:
        >>> wf = Workflow()
        >>> both = ParallelTasks([(abs, -1), (max, 2, 3)]).add_to(wf)
        >>> total = wf.add(sum, both)
        >>> wf.run(backend="inline")[total]
        4
    """

    calls: Sequence[Call]

    def add_to(self, workflow: Workflow, after: Iterable[TaskHandle | TaskHandles] = ()) -> TaskHandles:
        """Declare the tasks.

        Args:
            workflow: where.
            after: what all of them wait for.

        Returns:
            Their handles; as an argument, or in ``after=``, they stand for all of them.

        Raises:
            WorkflowError: there are none, or one is no call.
        """
        calls, before = list(self.calls), tuple(after)
        if not calls:
            raise WorkflowError(
                "ParallelTasks([]) has no tasks. Give it functions, or tuples of one and its arguments."
            )
        first = len(workflow)
        for fn, *arguments in map(_parts, calls):
            if before:
                options = fn.task_options.after if isinstance(fn, Task) else ()
                fn = task(fn).options(after=(*options, *before))
            workflow.add(fn, *arguments)
        return TaskHandles(workflow, range(first, len(workflow)))


def parallel(workflow: Workflow, *calls: Call) -> TaskHandles:
    """Declare tasks that run side by side; the same as ``ParallelTasks(calls).add_to(workflow)``.

    Example:
        >>> wf = Workflow()
        >>> both = parallel(wf, (abs, -1), (max, 2, 3))
        >>> wf.execution_layers()
        [['abs', 'max']]
    """
    return ParallelTasks(calls).add_to(workflow)


def map_reduce(
    workflow: Workflow,
    fn: Callable[..., Any],
    items: Iterable[Any],
    combine: Callable[[list[Any]], Any],
    fan_in: int = 8,
) -> TaskHandle:
    """Declare a task an item, and a tree of tasks that make one value of all of theirs.

    Args:
        workflow: where to declare them.
        fn: gets an item.
        items: at least one.
        combine: gets a list of at most ``fan_in`` values, in the order of the items: of ``fn``, or its own.
        fan_in: how many, 2 or more; the tree has as many layers as ``fan_in`` must be multiplied to reach the items.

    Returns:
        The handle of the last ``combine``, which is called for one item as well.

    Raises:
        WorkflowError: no items, or ``fan_in`` below 2.

    Example:
        >>> wf = Workflow()
        >>> total = map_reduce(wf, abs, [-1, -2, -3], sum, fan_in=2)
        >>> wf.run(backend="inline")[total]
        6
    """
    if not isinstance(fan_in, int) or fan_in < 2:
        raise WorkflowError(f"fan_in={fan_in!r} makes no tree. Give 2 or more.")
    handles: Sequence[TaskHandle] = list(workflow.map(fn, list(items)))
    if not handles:
        raise WorkflowError("map_reduce() has no items, so no value. Give it one or more.")
    while True:
        handles = [workflow.add(combine, handles[at : at + fan_in]) for at in range(0, len(handles), fan_in)]
        if len(handles) == 1:
            return handles[0]


class Included(Mapping[str, TaskHandle]):
    """The tasks of a workflow in another one that includes it: by their names there, or their handles.

    Args:
        outer: the workflow that includes.
        inner: the one that is included.
        places: (len(inner),) the number in ``outer`` of each task.
    """

    def __init__(self, outer: Workflow, inner: Workflow, places: NDArray[np.int32]) -> None:
        self._outer = outer
        self._inner = inner
        self._places = places

    def __getitem__(self, key: str | TaskHandle) -> TaskHandle:
        """Return the handle of a task in the outer workflow.

        Raises:
            UnknownTask: the inner workflow has no task of that name.
        """
        return TaskHandle(self._outer, int(self._places[self._inner.index_of(key)]))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return (self._inner.task_name(index) for index in range(len(self)))


def _include(outer: Workflow, inner: Workflow, bindings: Mapping[str, Any], prefix: str | None) -> Included:
    """Append the columns of a workflow to those of another; see `Workflow.include`."""
    if inner is outer:
        raise WorkflowError("a workflow cannot include itself. Include one that is declared apart.")
    prefix = _free_prefix(outer, prefix or inner.name, is_given=prefix is not None)
    bound = {inner.index_of(name): _as_handle(outer, value).index for name, value in bindings.items()}
    kept = np.ones(len(inner), np.bool_)
    kept[list(bound)] = False
    n = len(outer)
    rank = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32) + np.int32(n)
    places = rank[:-1].copy()
    for index, place in bound.items():
        places[index] = place
    _append_rows(outer, inner, prefix, kept, places)
    before, after = np.array(inner.before, np.int32), np.array(inner.after, np.int32)
    stays = kept[after]
    outer.before.extend(places[before[stays]].tolist())
    outer.after.extend(places[after[stays]].tolist())
    for branching in inner.branchings:
        then, otherwise = (range(int(rank[p.start]), int(rank[p.stop])) for p in (branching.then, branching.otherwise))
        gate, join = int(places[branching.gate]), int(places[branching.join])
        outer.branchings.append(branching._replace(gate=gate, then=then, otherwise=otherwise, join=join))
    outer.changed()
    return Included(outer, inner, places)


def _append_rows(
    outer: Workflow, inner: Workflow, prefix: str, kept: NDArray[np.bool_], places: NDArray[np.int32]
) -> None:
    """Append what there is a row of for each task, constant and reference."""
    plan, n_specs, n_templates = inner.plan(), len(outer.specs), len(outer.templates)
    for spec in inner.specs:
        outer.specs.append(replace(spec.without_handles(), base=f"{prefix}/{spec.base}"))
    outer.templates += [TemplateRow(row.spec + n_specs, row.layout, row.shared) for row in inner.templates]
    outer.template_of.extend((np.array(inner.template_of, np.int32)[kept] + n_templates).tolist())
    outer.ordinal_of.extend(np.array(inner.ordinal_of, np.int32)[kept].tolist())
    outer.adopt_names(
        {int(places[i]): f"{prefix}/{name}" for i, name in inner.explicit_names.items() if kept[i]},
        {f"{prefix}/{base}": count for base, count in inner.counters.items()},
    )
    of_kept = np.repeat(kept, np.diff(plan.reference_start))
    outer.references.extend(places[plan.references[of_kept]].tolist())
    if kept.all():
        outer.constants += inner.constants
    else:
        of_kept = np.repeat(kept, np.diff(plan.constant_start))
        outer.constants += [value for value, stays in zip(inner.constants, of_kept.tolist(), strict=False) if stays]


def _free_prefix(outer: Workflow, prefix: str, *, is_given: bool) -> str:
    """Return a prefix that no task has yet; one that was given is refused where it is taken."""
    found, number = prefix, 1
    while outer.has_prefix(found):
        if is_given:
            raise DuplicateTaskName(
                f"tasks of {outer.name!r} have the prefix {prefix!r} already. Give another prefix=.", name=prefix
            )
        found, number = f"{prefix}-{number}", number + 1
    return found


def _as_handle(workflow: Workflow, value: Any) -> TaskHandle:
    if isinstance(value, TaskHandle):
        workflow.refuse_foreign([value])
        return value
    return workflow.add(_given, value)


def _given(value: Any) -> Any:
    return value


def _parts(call: Call) -> tuple[Any, ...]:
    if isinstance(call, tuple) and call and callable(call[0]):
        return call
    if callable(call):
        return (call,)
    raise WorkflowError(f"{call!r} is no task. Give a function, or a tuple of a function and its arguments.")


_given.__name__ = "given"  # what the task is called
Engine.include = _include
