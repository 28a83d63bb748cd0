"""The columns of a workflow: what `Workflow.add` and `Workflow.map` append to, and the names of tasks.

    fn, options  ->  a `Spec`         found by the identity of the callable
    arguments    ->  a `TemplateRow`  the layout: constants and references to tasks, by position
    a task       ->  one number in each column, plus its constants and references

A million tasks are a few columns, not a million objects.
"""

from __future__ import annotations

import inspect
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from types import MethodType
from typing import Any, NamedTuple, Self

from forgepar._validate import async_error, check_callable, check_instance, shown
from forgepar.errors import DuplicateTaskName, WorkflowError
from forgepar.values.pickling import Dependencies
from forgepar.workflow.arguments import ATOMS, CONSTANT, NESTED, REFERENCE, ArgumentLayout, Hole, HoleRun, lift
from forgepar.workflow.binding import call_error
from forgepar.workflow.handles import TaskHandle, TaskHandles, foreign
from forgepar.workflow.tasks import Options, Task, base_name, is_prepared

NO_OPTIONS = Options()
_PREPARED = -1  # instead of the number of a spec: `unfold` gives the callable to add
_IN_ONE = "Declare both tasks in one workflow, or include one workflow in the other."


@dataclass(frozen=True, slots=True)
class Spec:
    """One callable with one set of options; tasks refer to it by its number."""

    fn: Callable[..., Any]
    options: Options
    base: str

    def without_handles(self) -> Spec:
        """Return this spec without the handles in its options."""
        if not self.options.after:
            return self
        fn = self.fn.options(after=()) if isinstance(self.fn, Task) else self.fn
        return Spec(fn, replace(self.options, after=()), self.base)


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """Shared part of tasks that are declared alike: a spec, a layout, and the keyword constants of `map`."""

    spec: int
    layout: ArgumentLayout
    shared: Mapping[str, Any]


class Branching(NamedTuple):
    """Two ranges of tasks: the ``then`` tasks run if the value of ``gate`` is true, else the ``otherwise`` tasks.

    Tasks that wait for the other range are skipped, except ``join`` and those that also wait for the range that runs.
    """

    gate: int
    then: range
    otherwise: range
    join: int

    def shifted(self, n: int) -> Branching:
        """Return the branching with ``n`` added to the number of each task."""
        then, otherwise = (range(part.start + n, part.stop + n) for part in (self.then, self.otherwise))
        return Branching(self.gate + n, then, otherwise, self.join + n)


class TaskColumns:
    """State of a workflow: callables, templates, and one row per task, constant, reference and order.

    Attributes:
        name: the workflow's name in reports.
        identity: random bytes that differ between any two workflows in any processes. A `Plan` has them instead of the
            workflow, which it does not keep alive.
        refers_to: functions and classes that the tasks' constants contain in pickled form; None if there are none.
        specs: callables with options.
        templates: shared parts of tasks that are declared alike.
        template_of: one row per task, its template.
        ordinal_of: one row per task, its number among the tasks of its base name; -1 for the first task of `add`, which
            is named by the base name alone.
        constants: all constants, task by task.
        references: the tasks that arguments refer to, task by task.
        before: for each order without data, the task that runs first.
        after: for each order without data, the task that waits.
        branchings: the branches that `when` declared.
        explicit_names: names from options, by task.
    """

    def __init__(self, name: str = "workflow") -> None:
        check_instance("name", name, str, "a string")
        self.name = name
        self.identity = _new_identity()
        self.refers_to: Dependencies | None = None
        self.specs: list[Spec] = []
        self.templates: list[TemplateRow] = []
        self.template_of = array("i")
        self.ordinal_of = array("i")
        self.constants: list[Any] = []
        self.references = array("i")
        self.before = array("i")
        self.after = array("i")
        self.branchings: list[Branching] = []
        self.explicit_names: dict[int, str] = {}
        self._names_taken: set[str] = set()
        self._counters: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}  # by prefix (a name up to a slash): the last number appended to it
        self._n_looked_at = 0  # how many of the counters have been searched for prefixes
        self._spec_of: dict[Any, int] = {}
        self._template_index: dict[Any, int] = {}
        self._plan: Any = None  # the `Plan` of these columns; None after a change

    def __len__(self) -> int:
        return len(self.template_of)

    def __getstate__(self) -> dict[str, Any]:
        # Specs are found by object ids, which differ in a copy. Handles in options are dropped: `before` and `after`
        # have their order.
        state = {
            **self.__dict__,
            "_plan": None,
            "_spec_of": {},
            "specs": [spec.without_handles() for spec in self.specs],
        }
        del state["identity"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A new identity: handles are numbers, and the original and its copies may get different tasks.
        self.__dict__.update(state, identity=_new_identity())

    def __copy__(self) -> Self:
        """Return a workflow with columns of its own: tasks added to one do not appear in the other."""
        twin = object.__new__(type(self))
        state = self.__getstate__()
        columns = {name: copy(value) for name, value in state.items() if isinstance(value, (list, dict, set, array))}
        twin.__setstate__(state | columns)
        return twin

    def changed(self) -> None:
        """Drop the plan, as the columns have changed."""
        self._plan = None

    @property
    def counters(self) -> Mapping[str, int]:
        """The number of tasks of each base name."""
        return self._counters

    def adopt_names(self, explicit: Mapping[int, str], counters: Mapping[str, int]) -> None:
        """Add explicit names by task, and replace the counts of base names."""
        self.explicit_names.update(explicit)
        self._names_taken.update(explicit.values())
        self._counters.update(counters)

    def has_prefix(self, prefix: str) -> bool:
        """Return whether the name of a task begins with a prefix and a slash."""
        for name in islice(self._counters, self._n_looked_at, None):  # counters are only ever added
            for at, letter in enumerate(name):
                if letter == "/":
                    self._prefixes.setdefault(name[:at], 0)
        self._n_looked_at = len(self._counters)
        return prefix in self._prefixes

    def new_prefix(self, prefix: str) -> str:
        """Return an unused prefix: the given one, or that with the next free number appended."""
        found = prefix
        while self.has_prefix(found):
            self._prefixes[prefix] += 1  # the next search continues here
            found = f"{prefix}-{self._prefixes[prefix]}"
        return found

    def task_name(self, index: int) -> str:
        """Return the name of a task from its number."""
        if name := self.explicit_names.get(index):
            return name
        base = self.specs[self.templates[self.template_of[index]].spec].base
        ordinal = self.ordinal_of[index]
        return base if ordinal < 0 else f"{base}-{ordinal}"

    def refuse_foreign(self, handles: Iterable[TaskHandle | TaskHandles]) -> None:
        """Raise `ForeignHandle` if a handle belongs to another workflow."""
        own: Any = self
        for handle in handles:
            if handle.workflow is not own:
                raise foreign(handle, self.name, _IN_ONE)

    def _spec(self, fn: Callable[..., Any]) -> int:
        # A bound method is a new object at each access, so its parts are the key. The spec keeps them alive, and so
        # their ids valid.
        key = (id(fn.__self__), id(fn.__func__)) if type(fn) is MethodType else id(fn)
        known = self._spec_of.get(key)
        if known is not None:
            return known
        options = fn.task_options if isinstance(fn, Task) else NO_OPTIONS
        plain = fn.fn if isinstance(fn, Task) else fn
        check_callable("fn", plain, WorkflowError)
        if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):  # and their partials
            raise async_error("fn", plain, WorkflowError)
        if is_prepared(plain):
            return _PREPARED
        if options == NO_OPTIONS:
            options = NO_OPTIONS
        index = len(self.specs)
        self.specs.append(Spec(fn, options, options.name or base_name(plain)))
        self._spec_of[key] = index
        return index

    def _new_template(self, key: Any, row: TemplateRow) -> int:
        spec, keywords = self.specs[row.spec], row.layout.keywords
        self._check_arguments(spec.fn, len(row.layout.kinds) - len(keywords), (*keywords, *row.shared))
        index = len(self.templates)
        self.templates.append(row)
        if key is not None:
            self._template_index[key] = index
        return index

    def _check_arguments(self, fn: Callable[..., Any], n_positional: int, keywords: tuple[str, ...]) -> None:
        """Raise `WorkflowError` if a function does not take these arguments."""
        error = call_error(fn.fn if isinstance(fn, Task) else fn, n_positional, keywords)
        if error is None:
            return
        base, (text, unknown) = base_name(fn), error
        remedy = "Pass the arguments that the function takes."
        if unknown in Options.__dataclass_fields__:
            remedy = f"To set a task option, use fp.task({base}).options({unknown}=...)."
        raise WorkflowError(f"Task {base!r} cannot be called with these arguments: {text}. {remedy}")

    def _next_ordinal(self, spec: int) -> int:
        base = self.specs[spec].base
        count = self._counters.get(base, 0)
        self._counters[base] = count + 1
        return count or -1

    def _place(self, value: Any, constants: list[Any], references: list[int]) -> int:
        """Append one argument to the constants or references and return its kind."""
        kind = type(value)
        if kind is TaskHandle:
            if value.workflow is not self:
                raise foreign(value, self.name, _IN_ONE)
            references.append(value.index)
            return REFERENCE
        if kind in ATOMS:
            constants.append(value)
            return CONSTANT
        n_before = len(references)
        lifted = lift(value, lambda part: self._take(part, references))
        constants.append(lifted)
        return CONSTANT if lifted is value else NESTED + len(references) - n_before

    def _take(self, part: Any, references: list[int]) -> Hole | HoleRun | None:
        """Return the hole for a handle or several, and append the tasks to the references; None for other values."""
        kind = type(part)
        if kind is not TaskHandle and kind is not TaskHandles:
            return None
        if part.workflow is not self:
            raise foreign(part, self.name, _IN_ONE)
        at = len(references)
        if kind is TaskHandle:
            references.append(part.index)
            return Hole(at)
        references.extend(part.indices)
        return HoleRun(at, len(part))

    def _common_length(self, fn: Callable[..., Any], columns: Sequence[Sequence[Any]]) -> int:
        lengths = sorted({len(column) for column in columns})
        if not columns:
            raise WorkflowError(f"map({base_name(fn)}) got no iterables. Pass one per positional argument.")
        if len(lengths) > 1:
            raise WorkflowError(
                f"The iterables of map({base_name(fn)}) must have equal lengths, got lengths {lengths}."
            )
        return lengths[0]

    def _refuse_handles(self, name: str, value: Any) -> None:
        found: list[int] = []
        if lift(value, lambda part: self._take(part, found)) is not value:
            raise WorkflowError(
                f"The constant {name!r} of map() must not contain handles, as all tasks share it. "
                "Pass an iterable such as [handle] * n, or add the tasks one by one."
            )

    def _append_map(self, fn: Any, spec: int, columns: Sequence[Sequence[Any]], shared: Mapping[str, Any]) -> range:
        """Add one task per row of equally long columns; return their numbers."""
        n_tasks = self._common_length(fn, columns)
        first = len(self.template_of)
        options, base = self.specs[spec].options, self.specs[spec].base
        try:
            for name, value in shared.items():
                self._refuse_handles(name, value)
            self.refuse_foreign(options.after)
            if all(map(_is_even, columns)):
                self._map_even(spec, columns, n_tasks, shared)
            else:
                self._map_uneven(spec, columns, shared)
        except RecursionError:
            raise too_deep(fn) from None
        for index in range(first, first + n_tasks) if options.after else ():
            self._wait_for(index, options.after)
        start = self._counters.get(base, 0)
        self.ordinal_of.extend(range(start, start + n_tasks))
        self._counters[base] = start + n_tasks
        self._plan = None
        return range(first, first + n_tasks)

    def _map_even(self, spec: int, columns: Sequence[Sequence[Any]], n_tasks: int, shared: Mapping[str, Any]) -> None:
        """Add tasks from columns of only constants or only handles: column by column, in C."""
        kinds = tuple(REFERENCE if isinstance(column, TaskHandles) else CONSTANT for column in columns)
        self.refuse_foreign(column for column in columns if isinstance(column, TaskHandles))
        constants = [column for column, kind in zip(columns, kinds, strict=True) if kind == CONSTANT]
        handles = [column.indices for column in columns if isinstance(column, TaskHandles)]
        template = self._new_template(None, TemplateRow(spec, ArgumentLayout(kinds, ()), shared))
        self.template_of.extend([template] * n_tasks)
        self.constants.extend(_interleaved(constants))
        self.references.extend(_interleaved(handles))

    def _map_uneven(self, spec: int, columns: Sequence[Sequence[Any]], shared: Mapping[str, Any]) -> None:
        """Add tasks that have handles at different positions."""
        templates: dict[tuple[int, ...], int] = {}
        all_constants: list[Any] = []
        all_references: list[int] = []
        chosen: list[int] = []
        for row in zip(*columns, strict=True):
            references: list[int] = []
            kinds = tuple([self._place(value, all_constants, references) for value in row])
            all_references += references
            if kinds not in templates:
                templates[kinds] = self._new_template(None, TemplateRow(spec, ArgumentLayout(kinds, ()), shared))
            chosen.append(templates[kinds])
        self.template_of.extend(chosen)
        self.constants += all_constants
        self.references.extend(all_references)

    def _declare_options(self, index: int, options: Options) -> None:
        self.refuse_foreign(options.after)
        if options.name is not None:
            if options.name in self._names_taken:
                raise DuplicateTaskName(
                    f"The workflow already has a task named {shown(options.name)}. Use another name=, or leave it out.",
                    name=options.name,
                )
            self._names_taken.add(options.name)
            self.explicit_names[index] = options.name
        self._wait_for(index, options.after)

    def _wait_for(self, index: int, handles: Iterable[TaskHandle | TaskHandles]) -> None:
        for handle in handles:
            first = [handle.index] if isinstance(handle, TaskHandle) else handle.indices
            self.before.extend(first)
            self.after.extend([index] * len(first))


def _interleaved(columns: Sequence[Iterable[Any]]) -> Iterable[Any]:
    """Return the items of equally long columns, row by row."""
    if len(columns) == 1:
        return columns[0]
    return (item for row in zip(*columns, strict=True) for item in row)


def too_deep(fn: Callable[..., Any]) -> WorkflowError:
    """Return the error for an argument that exceeds the recursion limit."""
    return WorkflowError(
        f"An argument of task {base_name(fn)!r} is nested too deeply to be searched for handles and pickled. "
        "Flatten it, or build it in the task."
    )


def _is_even(column: Sequence[Any]) -> bool:
    """Return whether a column of a map has only handles or only atoms."""
    return isinstance(column, (TaskHandles, range)) or ATOMS.issuperset(map(type, column))


def _new_identity() -> bytes:
    return os.urandom(16)
