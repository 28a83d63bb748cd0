"""Shapes that many workflows have, declared in one call.

Each is built from `Workflow.add` and `Workflow.map` alone, but for inclusion, which appends whole columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from forgepar.errors import DuplicateTaskName, UnknownTask, WorkflowError
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.tasks import Options, Task, own_task, task
from forgepar.validation import as_list, check_callable, check_instance, is_count, shown
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
    check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
    for place, step in enumerate(steps):
        check_callable(f"steps[{place}]", step, WorkflowError)
    if not steps:
        raise WorkflowError(
            f"sequence() has no steps, only {value!r}, which the first would get. Give it functions of one argument."
        )
    for step in steps:
        value = workflow.add(step, value)
    last: TaskHandle = value
    return last


@dataclass(frozen=True)
class ParallelTasks:
    """Several tasks as one: they run side by side, and the first that fails ends the run.

    Attributes:
        calls: functions that take nothing, or tuples of a function and its arguments, which may hold handles.

    Raises:
        WorkflowError: there are none, or one is no call.

    Example:
        >>> wf = Workflow()
        >>> both = ParallelTasks([(abs, -1), (max, 2, 3)]).add_to(wf)
        >>> total = wf.add(sum, both)
        >>> wf.run(backend="inline")[total]
        4
    """

    calls: Sequence[Call]

    def __post_init__(self) -> None:
        calls = tuple(map(_checked, as_list("calls", self.calls, kind=WorkflowError)))
        if not calls:
            raise WorkflowError(
                f"ParallelTasks(calls={shown(self.calls)}) has no tasks. Give it functions, or tuples of one and its "
                "arguments."
            )
        object.__setattr__(self, "calls", calls)

    def add_to(
        self, workflow: Workflow, after: TaskHandle | TaskHandles | Iterable[TaskHandle | TaskHandles] = ()
    ) -> TaskHandles:
        """Declare the tasks.

        Args:
            workflow: where.
            after: what all of them wait for, one handle or several.

        Returns:
            Their handles; as an argument, or in ``after=``, they stand for all of them.

        Raises:
            ForeignHandle: a handle of another workflow.
            DuplicateTaskName: the same names are there already: tasks with ``name=`` can be declared but once.
        """
        check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
        before = Options(after=after).after  # type: ignore[arg-type]  # it takes one handle, too
        workflow.refuse_foreign(before)
        first = len(workflow)
        for call in self.calls:
            fn, *arguments = call if isinstance(call, tuple) else (call,)
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
    items: Iterable[Any] | TaskHandle,
    combine: Callable[[list[Any]], Any],
    fan_in: int = 8,
) -> TaskHandle:
    """Declare a task an item, and a tree of tasks that make one value of all of theirs.

    Args:
        workflow: where to declare them.
        fn: gets an item.
        items: at least one.
        combine: gets a list of at most ``fan_in`` values, in the order of the items: of ``fn``, or its own. If it has a
            ``name=``, the last one is called that, and the others are numbered.
        fan_in: how many, 2 or more; the tree has as many layers as ``fan_in`` must be multiplied to reach the items.

    Returns:
        The handle of the last ``combine``, which is called for one item as well.

    Raises:
        WorkflowError: no items, a handle in their place, or ``fan_in`` below 2.

    Example:
        >>> wf = Workflow()
        >>> total = map_reduce(wf, abs, [-1, -2, -3], sum, fan_in=2)
        >>> wf.run(backend="inline")[total]
        6
    """
    check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
    check_callable("fn", fn, WorkflowError)
    check_callable("combine", combine, WorkflowError)
    if not is_count(fan_in, 2):
        raise WorkflowError(f"fan_in={fan_in!r} makes no tree. Give 2 or more.")
    if isinstance(items, TaskHandle):
        raise WorkflowError(
            f"map_reduce() cannot tell how many items {items!r} will have, so how deep a tree to make. "
            "Give it the items, or add combine as one task of what Workflow.map of that handle returns."
        )
    items = items if isinstance(items, Sequence) else as_list("items", items, kind=WorkflowError)
    if not items:
        raise WorkflowError("map_reduce() has no items, so no value. Give it one or more.")
    values: Sequence[TaskHandle] = workflow.map(fn, items)
    while len(values) > fan_in:
        values = workflow.map(combine, [values[at : at + fan_in] for at in range(0, len(values), fan_in)])
    return workflow.add(combine, values)


class Included(Mapping[str, TaskHandle]):
    """The tasks of a workflow in another one that includes it: by their names or handles in the one that is included.

    Args:
        outer: the workflow that includes.
        inner: the one that is included.
        places: (len(inner),) the number in ``outer`` of each task.
    """

    def __init__(self, outer: Workflow, inner: Workflow, places: NDArray[np.int32]) -> None:
        self._outer = outer
        self._inner = inner
        self._places = places

    @overload
    def __getitem__(self, key: str | TaskHandle) -> TaskHandle: ...
    @overload
    def __getitem__(self, key: TaskHandles) -> Sequence[TaskHandle]: ...
    def __getitem__(self, key: str | TaskHandle | TaskHandles) -> TaskHandle | Sequence[TaskHandle]:
        """Return the handle of a task in the outer workflow; of several tasks, their handles.

        Raises:
            UnknownTask: the inner workflow has no task of that name, or had none when it was included.
            ForeignHandle: a handle that is not the inner workflow's.
        """
        if isinstance(key, TaskHandles):
            self._inner.refuse_foreign([key])
            return _handles(self._outer, self._places[[self._known(index) for index in key.indices]])
        return TaskHandle(self._outer, int(self._places[self._known(self._inner.index_of(key, argument="key"))]))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return (self._inner.task_name(index) for index in range(len(self)))

    def _known(self, index: int) -> int:
        """Return a task's number if the task was there when its workflow was included."""
        if index >= len(self._places):
            raise UnknownTask(
                f"task {self._inner.task_name(index)!r} was added to workflow {self._inner.name!r} after that was "
                f"included in {self._outer.name!r}. Include it once it is complete."
            )
        return index


def _include(outer: Workflow, inner: Workflow, bindings: Mapping[str, Any], prefix: str | None) -> Included:
    """Append the columns of a workflow to those of another; see `Workflow.include`."""
    if inner is outer:
        raise WorkflowError("a workflow cannot include itself. Include one that is declared apart.")
    chosen = _free_prefix(outer, inner, prefix)
    replaced = {inner.index_of(name): value for name, value in bindings.items()}
    _refuse_joins(inner, replaced)
    outer.refuse_foreign(value for value in replaced.values() if isinstance(value, (TaskHandle, TaskHandles)))
    gates = {branching.gate for branching in inner.branchings}
    bound = {
        index: _stand_in(outer, value, f"{chosen}/{inner.task_name(index)}", is_gate=index in gates).index
        for index, value in replaced.items()
    }
    kept = np.ones(len(inner), np.bool_)
    kept[list(bound)] = False
    n = len(outer)
    rank = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32) + np.int32(n)
    places = rank[:-1].copy()
    for index, place in bound.items():
        places[index] = place
    _append_rows(outer, inner, chosen, kept, places)
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


def _free_prefix(outer: Workflow, inner: Workflow, prefix: str | None) -> str:
    """Return a prefix that no task has yet; one that was given is refused where it is taken."""
    if prefix is None:
        return outer.new_prefix(inner.name)
    if not prefix:
        raise WorkflowError("prefix='' is no prefix. Give a text, or None for the name of the workflow.")
    if outer.has_prefix(prefix):
        raise DuplicateTaskName(
            f"tasks of {outer.name!r} have the prefix {prefix!r} already. Give another prefix=.", name=prefix
        )
    return prefix


def _refuse_joins(inner: Workflow, bound: Collection[int]) -> None:
    """Refuse to replace what joins two branches: it is what both of them end at, and alone waits for either."""
    for branching in inner.branchings:
        if branching.join in bound:
            raise WorkflowError(
                f"task {inner.task_name(branching.join)!r} of {inner.name!r} joins two branches, so nothing else can "
                "be had instead of it. Bind the task that takes its value."
            )


def _stand_in(workflow: Workflow, value: Any, name: str, *, is_gate: bool) -> TaskHandle:
    """Return what stands for a bound task. Each branching has a gate of its own, whatever decides it."""
    if isinstance(value, TaskHandle) and not is_gate:
        return value
    return workflow.add(own_task(bool if is_gate else _given).options(name=name), value)


def _handles(workflow: Workflow, places: NDArray[np.int32]) -> Sequence[TaskHandle]:
    """Return the handles of tasks, as a run where they are consecutive."""
    if len(places) and bool((np.diff(places) == 1).all()):
        return TaskHandles(workflow, range(int(places[0]), int(places[-1]) + 1))
    return [TaskHandle(workflow, index) for index in places.tolist()]


def _given(value: Any) -> Any:
    return value


def _checked(call: Call) -> Call:
    if callable(call) or (isinstance(call, tuple) and call and callable(call[0])):
        return call
    raise WorkflowError(
        f"calls has {shown(call)}, which is no task. Give a function, or a tuple of a function and its arguments."
    )


Engine.include = _include
