"""Common shapes of workflows: chains, parallel tasks, reductions, and workflows in workflows.

All of them call `Workflow.add` and `Workflow.map`, except inclusion, which appends whole columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import as_list, check_callable, check_count, check_instance, check_text, refusal, shown
from forgepar.errors import DuplicateTaskName, UnknownTask, WorkflowError
from forgepar.version import public
from forgepar.workflow.columns import TemplateRow
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.tasks import Options, Task, own_task, task
from forgepar.workflow.workflow import Workflow

# A task to declare: a function without arguments, or a tuple of a function and its arguments.
Call: TypeAlias = Callable[..., Any] | tuple[Any, ...]
_CALLS = "functions, or tuples of a function and its arguments"


@public
def sequence(workflow: Workflow, value: Any, *steps: Callable[..., Any]) -> TaskHandle:
    """Declare a chain: each step gets the value of the one before.

    Args:
        workflow: the workflow to declare it in.
        value: the argument of the first step: a handle, or any other value.
        *steps: functions of one argument.

    Returns:
        The handle of the last step.

    Raises:
        WorkflowError: there are no steps.

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
        raise WorkflowError(f"sequence() needs at least one step after the value {shown(value)}, got none.")
    for step in steps:
        value = workflow.add(step, value)
    last: TaskHandle = value
    return last


@public
@dataclass(frozen=True)
class ParallelTasks:
    """Several tasks as one value: they run in parallel, and the first that fails ends the run.

    Attributes:
        calls: functions without arguments, or tuples of a function and its arguments, which may contain handles.

    Raises:
        WorkflowError: there are no calls, or one is not a function or such a tuple.

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
            raise refusal("calls", f"one or more {_CALLS}", self.calls, WorkflowError)
        object.__setattr__(self, "calls", calls)

    def add_to(
        self, workflow: Workflow, after: TaskHandle | TaskHandles | Iterable[TaskHandle | TaskHandles] = ()
    ) -> TaskHandles:
        """Declare the tasks.

        Args:
            workflow: the workflow to declare them in.
            after: one or more handles that all of the tasks wait for.

        Returns:
            The tasks' handles; as an argument, or in ``after=``, they stand for all of them.

        Raises:
            ForeignHandle: a handle belongs to another workflow.
            DuplicateTaskName: the workflow already has these tasks, and they have a ``name=``.
        """
        check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
        before = Options(after=after).after  # type: ignore[arg-type]  # it accepts a single handle too
        workflow.refuse_foreign(before)
        first = len(workflow)
        for call in self.calls:
            fn, *arguments = call if isinstance(call, tuple) else (call,)
            if before:
                options = fn.task_options.after if isinstance(fn, Task) else ()
                fn = task(fn).options(after=(*options, *before))
            workflow.add(fn, *arguments)
        return TaskHandles(workflow, range(first, len(workflow)))


@public
def parallel(workflow: Workflow, *calls: Call) -> TaskHandles:
    """Declare tasks that run in parallel; the same as ``ParallelTasks(calls).add_to(workflow)``.

    Example:
        >>> wf = Workflow()
        >>> both = parallel(wf, (abs, -1), (max, 2, 3))
        >>> wf.execution_layers()
        [['abs', 'max']]
    """
    return ParallelTasks(calls).add_to(workflow)


@public
def map_reduce(
    workflow: Workflow,
    fn: Callable[..., Any],
    items: Iterable[Any] | TaskHandle,
    combine: Callable[[list[Any]], Any],
    fan_in: int = 8,
) -> TaskHandle:
    """Declare one task per item, and a tree of tasks that combine their values into one.

    Args:
        workflow: the workflow to declare them in.
        fn: a function of an item.
        items: one or more items.
        combine: a function of a list of at most ``fan_in`` values of ``fn`` or of ``combine``, in the order of the
            items. If it has a ``name=``, the last task has this name, and the others have numbers appended.
        fan_in: the most values per call of ``combine``, 2 or more. The tree has log(items) / log(fan_in) layers,
            rounded up.

    Returns:
        The handle of the last ``combine``, which is also called for a single item.

    Raises:
        WorkflowError: there are no items, the items are a handle, or ``fan_in`` is below 2.

    Example:
        >>> wf = Workflow()
        >>> total = map_reduce(wf, abs, [-1, -2, -3], sum, fan_in=2)
        >>> wf.run(backend="inline")[total]
        6
    """
    check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
    check_callable("fn", fn, WorkflowError)
    check_callable("combine", combine, WorkflowError)
    check_count("fan_in", fan_in, 2, kind=WorkflowError)
    if isinstance(items, TaskHandle):
        raise WorkflowError(
            f"items must be known when map_reduce() is called, as they determine the tree of tasks; got "
            f"{shown(items)}. Pass the items, or add combine as a single task of the handle that Workflow.map returns."
        )
    items = items if isinstance(items, Sequence) else as_list("items", items, kind=WorkflowError)
    if not items:
        raise WorkflowError(f"items must not be empty, got {shown(items)}.")
    values: Sequence[TaskHandle] = workflow.map(fn, items)
    while len(values) > fan_in:
        values = workflow.map(combine, [values[at : at + fan_in] for at in range(0, len(values), fan_in)])
    return workflow.add(combine, values)


@public
class Included(Mapping[str, TaskHandle]):
    """Tasks of an included workflow: maps their names and handles there to handles of the outer workflow.

    Args:
        outer: the workflow that includes the other.
        inner: the included workflow.
        places: (len(inner),) the number in ``outer`` of each task of ``inner``.
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
        """Return the outer workflow's handle of a task, or its handles of several tasks.

        Raises:
            UnknownTask: the inner workflow has no task of that name, or had none when it was included.
            ForeignHandle: the handle does not belong to the inner workflow.
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
        """Return a task's number after checking that its workflow had it when it was included."""
        if index >= len(self._places):
            raise UnknownTask(
                f"Task {self._inner.task_name(index)!r} was added to workflow {self._inner.name!r} after "
                f"{self._outer.name!r} had included it. Include a workflow once it is complete."
            )
        return index


def include(outer: Workflow, inner: Workflow, bindings: Mapping[str, Any], prefix: str | None) -> Included:
    """Append the columns of a workflow to those of another; see `Workflow.include`."""
    if inner is outer:
        raise WorkflowError("A workflow cannot include itself. Include another workflow.")
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
    """Append the rows of specs, templates, tasks, constants and references."""
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
    """Return a prefix that no task has; raise an error if the given one is in use."""
    if prefix is None:
        return outer.new_prefix(inner.name)
    check_text("prefix", prefix, WorkflowError)
    if outer.has_prefix(prefix):
        raise DuplicateTaskName(
            f"Workflow {shown(outer.name)} already has tasks with the prefix {shown(prefix)}. Use another prefix=.",
            name=prefix,
        )
    return prefix


def _refuse_joins(inner: Workflow, bound: Collection[int]) -> None:
    """Raise an error if a binding replaces a task that joins two branches, as it alone waits for either of them."""
    for branching in inner.branchings:
        if branching.join in bound:
            raise WorkflowError(
                f"Task {inner.task_name(branching.join)!r} of {inner.name!r} joins two branches, so a binding cannot "
                "replace it. Bind the task that takes its value."
            )


def _stand_in(workflow: Workflow, value: Any, name: str, *, is_gate: bool) -> TaskHandle:
    """Return the handle that replaces a bound task. A gate is always a new task, as each branching needs its own."""
    if isinstance(value, TaskHandle) and not is_gate:
        return value
    return workflow.add(own_task(bool if is_gate else _given).options(name=name), value)


def _handles(workflow: Workflow, places: NDArray[np.int32]) -> Sequence[TaskHandle]:
    """Return the handles of tasks, as `TaskHandles` if the tasks are consecutive."""
    if len(places) and bool((np.diff(places) == 1).all()):
        return TaskHandles(workflow, range(int(places[0]), int(places[-1]) + 1))
    return [TaskHandle(workflow, index) for index in places.tolist()]


def _given(value: Any) -> Any:
    return value


def _checked(call: Call) -> Call:
    if callable(call) or (isinstance(call, tuple) and call and callable(call[0])):
        return call
    raise refusal("calls", _CALLS, call, WorkflowError)
