"""`Plan`: the workflow frozen as columns, which everything after the declaration reads.

Tasks are numbers. `Plan.order` sorts them by layer, then template, then number, so a layer is a slice of it, and a
batch (tasks of one template) is a slice of a layer. `Plan.group_end` is where the tasks of each template end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import check_instance, shown
from forgepar.errors import CyclicWorkflow, DuplicateTaskName, UnknownTask, WorkflowError
from forgepar.graph import Adjacency, CycleFound, longest_path_layers
from forgepar.workflow.adapters import as_compensation, as_handler
from forgepar.workflow.arguments import CONSTANT, REFERENCE, ArgumentLayout
from forgepar.workflow.columns import Spec, TemplateRow
from forgepar.workflow.handles import TaskHandle, TaskHandles, foreign
from forgepar.workflow.tasks import Options, Task, base_name
from forgepar.workflow.workflow import Workflow

IntArray: TypeAlias = NDArray[np.int32]
# Tasks by number. Consecutive ones are a range, which becomes a slice of a numpy array or list.
Tasks: TypeAlias = range | IntArray

_ITS_VALUE = ArgumentLayout((REFERENCE,), ())
_OF_ITS_OWN = (
    "Use the result of a run of the handle's own workflow. For a task of an included workflow, use the handle that "
    "Workflow.include returns: included[handle]; for a task of a copy, Workflow.handle."
)
_ORDINAL = re.compile("0|[1-9][0-9]{0,17}")


class StandIns:
    """Extra templates, by which a worker runs something else for a task: its compensation or its error handler.

    They come after the plan's own templates, and no task has them.

    Attributes:
        undo: by template, the template that undoes its tasks.
        catch: by template and step of the fallback, the template that handles the errors of its tasks.
        undo_options: by undoing template, its options: those of ``compensate`` if that is a `Task`.
        base_of: by stand-in, the template that it stands in for.
        of_base: by template, its stand-ins, if there are any.
    """

    def __init__(self) -> None:
        self.undo: dict[int, int] = {}
        self.undo_options: dict[int, Options] = {}
        self.catch: dict[tuple[int, int], int] = {}
        self.base_of: dict[int, int] = {}
        self.of_base: dict[int, list[int]] = {}

    def copy(self) -> StandIns:
        """Return a copy that can be extended."""
        twin = StandIns()
        twin.undo, twin.catch, twin.base_of = dict(self.undo), dict(self.catch), dict(self.base_of)
        twin.undo_options = dict(self.undo_options)
        twin.of_base = {base: list(numbers) for base, numbers in self.of_base.items()}
        return twin

    def extend(self, plan: Plan, templates: range) -> None:
        """Append the stand-ins of some templates to the templates of a plan."""
        rows: list[TemplateRow] = []
        numbers: dict[tuple[str, int], int] = {}

        def add(base: int, kind: str, layout: ArgumentLayout, shared: Mapping[str, Any], fn: Callable[..., Any]) -> int:
            number = len(plan.templates) + len(rows)
            rows.append(TemplateRow(plan.templates[base].spec, layout, shared))
            key = (kind, id(fn))
            if key not in numbers:
                numbers[key] = len(plan.callables)
                plan.callables.append(as_compensation(fn) if kind == "undo" else as_handler(fn))
            plan.callable_of.append(numbers[key])
            self.base_of[number] = base
            self.of_base.setdefault(base, []).append(number)
            return number

        for base in templates:
            row = plan.templates[base]
            options = plan.specs[row.spec].options
            if options.compensate is not None:
                undo = options.compensate
                fn = undo.fn if isinstance(undo, Task) else undo
                number = self.undo[base] = add(base, "undo", _ITS_VALUE, {}, fn)
                self.undo_options[number] = (
                    undo.task_options if isinstance(undo, Task) else Options(timeout=options.timeout)
                )
            for place, step in enumerate(options.fallback):
                if step.kind == "call":
                    layout = ArgumentLayout((CONSTANT, *row.layout.kinds), row.layout.keywords)
                    self.catch[base, place] = add(base, "catch", layout, row.shared, step.what)
        plan.templates = (*plan.templates, *rows)


class _Unloaded:
    """Placeholder for a function; keeps its name only."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("A copy of a result has the names of functions, but not the functions.")


class Plan:
    """A workflow frozen as columns.

    Args:
        workflow: the workflow to freeze. The plan does not have tasks that are added to it later.

    Attributes:
        identity: the workflow's, which identifies its handles.
        n_declared: number of tasks of the workflow; later ones are from subflows and have no handles.
        n_tasks: number of all tasks.
        template_of: int32, the template of each task.
        specs: callables with their options.
        templates: shared parts of tasks that are declared alike, followed by the templates of the stand-ins.
        stand_ins: templates of compensations and error handlers.
        callables: the distinct functions, without options.
        callable_of: the callable of each template.
        constants: all constants, task by task; those of a task begin at ``constant_start[task]``.
        branchings: by gate, the branches that its value decides.
        alias: by task that returned a subflow, the task with its value.
        references: int32, all tasks whose values are taken, task by task, from ``reference_start[task]`` on.
        ordinals: int32, the number at the end of each task's name, after the base of its spec; -1 for no number.

    Raises:
        CyclicWorkflow: on the first access to the layers.
    """

    def __init__(self, workflow: Workflow) -> None:
        self.workflow_name = workflow.name
        self.identity = workflow.identity
        self.n_tasks = self.n_declared = len(workflow)
        self.specs: Sequence[Spec] = tuple(workflow.specs)
        self.templates: Sequence[TemplateRow] = tuple(workflow.templates)
        numbers: dict[int, int] = {}
        self.callables: list[Callable[..., Any]] = []
        of_spec: list[int] = []
        for spec in self.specs:
            plain = spec.fn.fn if isinstance(spec.fn, Task) else spec.fn
            if id(plain) not in numbers:
                numbers[id(plain)] = len(self.callables)
                self.callables.append(spec.fn)
            of_spec.append(numbers[id(plain)])
        self.callable_of: list[int] = [of_spec[template.spec] for template in self.templates]
        self.stand_ins = StandIns()
        self.stand_ins.extend(self, range(len(self.templates)))
        self.template_of: IntArray = np.array(workflow.template_of, np.int32)
        self.references: IntArray = np.array(workflow.references, np.int32)
        self.constants = workflow.constants  # shared, as a workflow only appends to it
        n_references = np.array([t.layout.n_references for t in self.templates] or [0], np.int64)
        n_constants = np.array([t.layout.n_constants for t in self.templates] or [0], np.int64)
        self.reference_start = _starts(n_references[self.template_of])
        self.constant_start = _starts(n_constants[self.template_of])
        self.branchings = {branching.gate: branching for branching in workflow.branchings}
        self._before = np.array(workflow.before, np.int32)
        self._after = np.array(workflow.after, np.int32)
        self.ordinals: IntArray = np.array(workflow.ordinal_of, np.int32)
        self.alias: dict[int, int] = {}
        self._explicit = dict(workflow.explicit_names)
        self.ordinals[list(self._explicit)] = -1  # an explicit name is the base itself

    def spliced(self, task: int, inner: Workflow) -> Plan:
        """Return a plan with the tasks of a subflow appended, which ``task`` returned.

        The new tasks wait for ``task``. What waited for ``task`` now waits for the last of them, which has its value.
        The numbers of this plan stay valid. Cost: O(n + m) of the whole.

        Raises:
            CyclicWorkflow: the dependencies of the subflow have a cycle.
        """
        n, prefix = self.n_tasks, self.name(task)
        last = n + len(inner) - 1
        new = object.__new__(Plan)
        new.__dict__ = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
        n_templates, n_specs = len(self.templates), len(self.specs)
        new.n_tasks = last + 1
        new.specs = (*self.specs, *(replace(spec, base=f"{prefix}/{spec.base}") for spec in inner.specs))
        rows = [TemplateRow(row.spec + n_specs, row.layout, row.shared) for row in inner.templates]
        new.templates = (*self.templates, *rows)
        new.callables, new.callable_of = [*self.callables], [*self.callable_of]
        first_callable = len(new.callables)
        new.callables += [spec.fn for spec in inner.specs]
        new.callable_of += [first_callable + row.spec for row in inner.templates]
        new.stand_ins = self.stand_ins.copy()
        new.stand_ins.extend(new, range(n_templates, len(new.templates)))
        template_of, references = np.array(inner.template_of, np.int32), np.array(inner.references, np.int32)
        new.template_of = np.concatenate([self.template_of, template_of + np.int32(n_templates)])
        new.references = np.concatenate([_redirected(self.references, task, last), references + np.int32(n)])
        new.constants = [*self.constants, *inner.constants]
        new.reference_start = _longer(self.reference_start, [r.layout.n_references for r in rows], template_of)
        new.constant_start = _longer(self.constant_start, [r.layout.n_constants for r in rows], template_of)
        new.ordinals = np.concatenate([self.ordinals, np.array(inner.ordinal_of, np.int32)])
        new.ordinals[[n + i for i in inner.explicit_names]] = -1
        new._explicit = self._explicit | {n + i: f"{prefix}/{name}" for i, name in inner.explicit_names.items()}
        new.branchings = self.branchings | {b.gate + n: b.shifted(n) for b in inner.branchings}
        new.alias = self.alias | {task: last}
        waits = np.zeros(len(inner), np.bool_)
        waits[np.array(inner.after, np.int32)] = True
        waits |= np.diff(new.reference_start[n:]) > 0
        first = np.flatnonzero(~waits).astype(np.int32) + np.int32(n)
        before, after = (np.array(column, np.int32) + np.int32(n) for column in (inner.before, inner.after))
        starts = np.full(len(first), task, np.int32)
        new._before = np.concatenate([_redirected(self._before, task, last), before, starts])
        new._after = np.concatenate([self._after, after, first])
        new.layers  # noqa: B018  (raises if there is a cycle)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    @cached_property
    def outline(self) -> Plan:
        """The plan without functions, options and arguments: tasks, names and dependencies, as records need them."""
        made = object.__new__(Plan)
        made.__dict__ = {
            **self.__getstate__(),
            "specs": tuple([Spec(_Unloaded(base_name(spec.fn)), Options(), spec.base) for spec in self.specs]),
            "templates": tuple([TemplateRow(row.spec, row.layout, {}) for row in self.templates]),
            "callables": [_Unloaded(base_name(fn)) for fn in self.callables],
            "constants": [],
        }
        return made

    @cached_property
    def graph(self) -> Adjacency:
        """The edges, from each task to those that wait for it."""
        takers = np.repeat(np.arange(self.n_tasks, dtype=np.int32), np.diff(self.reference_start))
        sources = np.concatenate([self.references, self._before])
        return Adjacency.from_edges(self.n_tasks, sources, np.concatenate([takers, self._after]))

    @cached_property
    def layers(self) -> IntArray:
        """The layer of each task: the length of the longest path to it from a task without dependencies."""
        try:
            layers: IntArray = longest_path_layers(self.graph)
        except CycleFound as found:
            names = [self.name(i) for i in found.cycle]
            path = " -> ".join([*names, names[0]])
            raise CyclicWorkflow(
                f"Workflow {self.workflow_name!r} has a dependency cycle: {path}. Remove one of these dependencies.",
                cycle=names,
            ) from None
        return layers

    @cached_property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.layer_start) - 1

    @cached_property
    def order(self) -> IntArray:
        """All tasks by layer, template and number."""
        key = self.layers.astype(np.int64) * len(self.templates) + self.template_of
        return np.argsort(key, kind="stable").astype(np.int32)

    @cached_property
    def layer_start(self) -> list[int]:
        """Where in `order` each layer begins, and where the last one ends."""
        counts = np.bincount(self.layers) if self.n_tasks else np.zeros(0, np.int64)
        return [0, *np.cumsum(counts).tolist()]

    @cached_property
    def group_end(self) -> IntArray:
        """For each position in `order`, the end of the tasks with the same layer and template."""
        layers, templates = self.layers[self.order], self.template_of[self.order]
        changes = np.flatnonzero((np.diff(layers) != 0) | (np.diff(templates) != 0)) + 1
        ends = np.append(changes, self.n_tasks)
        return np.repeat(ends, np.diff(ends, prepend=0)).astype(np.int32)

    @cached_property
    def leaves(self) -> IntArray:
        """The tasks whose value no other task takes."""
        taken = np.bincount(self.references, minlength=self.n_tasks)
        return np.flatnonzero(taken == 0).astype(np.int32)

    @property
    def widest_layer(self) -> int:
        """How many tasks the layer with the most tasks has."""
        return max(end - begin for begin, end in pairwise(self.layer_start))

    def needs(self) -> Iterator[tuple[str, int]]:
        """Yield the name of one task of each template that declares memory, and how much it declares, bytes."""
        for template, need in enumerate(self.memories):
            if need:
                yield self.name(int((self.template_of == template).argmax())), need

    @cached_property
    def timeouts(self) -> list[float | None]:
        """The timeout of each template's tasks in seconds; stand-ins that undo tasks have their own."""
        timeouts = [self.specs[template.spec].options.timeout for template in self.templates]
        for template, options in self.stand_ins.undo_options.items():
            timeouts[template] = options.timeout
        return timeouts

    @cached_property
    def memories(self) -> list[int]:
        """The memory that each template's tasks declare, in bytes; 0 for none, and for what undoes them."""
        memories = [self.specs[template.spec].options.memory or 0 for template in self.templates]
        for template in self.stand_ins.undo_options:
            memories[template] = 0
        return memories

    def called(self) -> tuple[list[str], IntArray]:
        """Return the distinct names of the callables, and for each task the number of its name: (n_tasks,)."""
        names = [base_name(fn) for fn in self.callables]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        of_template = np.array([numbers[names[number]] for number in self.callable_of], np.int32)
        return list(numbers), of_template[self.template_of]

    def callables_for(self, template: int) -> list[int]:
        """Return the callables that tasks of a template may need: their own and those of its stand-ins."""
        return [self.callable_of[number] for number in (template, *self.stand_ins.of_base.get(template, ()))]

    @property
    def order_only(self) -> tuple[IntArray, IntArray]:
        """The edges without data: the tasks that run first, and the tasks that wait."""
        return self._before, self._after

    @property
    def given_names(self) -> Mapping[int, str]:
        """The explicit names, by task."""
        return self._explicit

    def spec(self, task: int) -> Spec:
        """Return the callable and options of a task."""
        return self.specs[self.templates[int(self.template_of[task])].spec]

    def name(self, task: int) -> str:
        """Return a task's name."""
        if name := self._explicit.get(task):
            return name
        ordinal = int(self.ordinals[task])
        return self.spec(task).base if ordinal < 0 else f"{self.spec(task).base}-{ordinal}"

    def find(self, name: str) -> int:
        """Return the number of the task with this name.

        Raises:
            UnknownTask: there is no such task.
        """
        if name in self._explicit_index:
            return self._explicit_index[name]
        found = self._derived(name)
        if not found:
            raise UnknownTask(
                f"Workflow {self.workflow_name!r} has no task named {shown(name)}. "
                "Workflow.execution_layers() lists the names."
            )
        return found[0]

    def index_of(self, key: TaskHandle | str) -> int:
        """Return the number of a task from its handle or name.

        Raises:
            ForeignHandle: the handle belongs to another workflow.
            UnknownTask: there is no such task, or it was declared after this plan was made.
            WorkflowError: the key is neither a handle nor a name.
        """
        if isinstance(key, TaskHandle):
            return self.indices_of(key)[0]
        check_instance("key", key, str, "a handle or the name of a task", WorkflowError)
        return self.find(key)

    def indices_of(self, handle: TaskHandle | TaskHandles) -> Sequence[int]:
        """Return the numbers of the tasks of a handle, or of the handles of several tasks.

        Raises:
            ForeignHandle: the handle belongs to another workflow.
            UnknownTask: a task was declared after this plan was made.
        """
        if handle.workflow.identity != self.identity:
            raise foreign(handle, self.workflow_name, _OF_ITS_OWN)
        indices = handle.indices if isinstance(handle, TaskHandles) else (handle.index,)
        if len(indices) and max(indices[0], indices[-1]) >= self.n_declared:
            late = handle.workflow.task_name(max(indices[0], indices[-1]))
            raise UnknownTask(
                f"Task {late!r} was added to workflow {self.workflow_name!r} after this run began, so it did not run. "
                "Run the workflow again."
            )
        return indices

    def check_names(self) -> None:
        """Raise `DuplicateTaskName` if an explicit name equals a derived one."""
        bare = ((int(tasks[0]), base) for base, tasks in self._by_base.items() if "-" in base and len(tasks))
        for task, name in [*self._explicit.items(), *bare]:
            others = [other for other in self._derived(name) if other != task]
            if others and self.name(task) == name:
                raise DuplicateTaskName(
                    f"Task {name!r} has the name that another task derives from its callable. "
                    "Set another name= on one of them.",
                    name=name,
                )

    def tasks_by_layer(self) -> list[list[int]]:
        """Return the tasks of each layer, in order of declaration."""
        starts = self.layer_start
        return [np.sort(self.order[a:b]).tolist() for a, b in pairwise(starts)]

    @cached_property
    def _explicit_index(self) -> dict[str, int]:
        return {name: task for task, name in self._explicit.items()}

    @cached_property
    def _by_base(self) -> dict[str, IntArray]:
        """For each base name its tasks, ordered by ordinal."""
        bases = [self.specs[template.spec].base for template in self.templates]
        numbers = {base: i for i, base in enumerate(dict.fromkeys(bases))}
        base_of = np.array([numbers[base] for base in bases] or [0], np.int32)[self.template_of]
        tasks = np.argsort(base_of, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(base_of, minlength=len(numbers)))[:-1]
        return dict(zip(numbers, np.split(tasks, ends), strict=True)) if numbers else {}

    def _derived(self, name: str) -> list[int]:
        """Return the tasks with this derived name: none, one, or two if the name of a callable ends in a number."""
        base, dash, digits = name.rpartition("-")
        places = [(name, -1)]
        if dash and _ORDINAL.fullmatch(digits):
            places.append((base, int(digits)))
        found = []
        for base, ordinal in places:
            tasks = self._by_base.get(base, ())
            place = max(ordinal, 0)
            if place >= len(tasks) or self.ordinals[tasks[place]] != ordinal:
                # Some tasks of the base are missing, as in a partly included workflow, or have explicit names.
                place = int(np.argmax(self.ordinals[tasks] == ordinal)) if len(tasks) else 0
            if place < len(tasks):
                task = int(tasks[place])
                if self.ordinals[task] == ordinal and task not in self._explicit:
                    found.append(task)
        return found


_DERIVED = frozenset(name for name, value in vars(Plan).items() if isinstance(value, cached_property))


def _redirected(column: IntArray, old: int, new: int) -> IntArray:
    found: IntArray = np.where(column == old, np.int32(new), column)
    return found


def _longer(starts: NDArray[np.int64], counts: list[int], template_of: IntArray) -> NDArray[np.int64]:
    """Return where the rows of more tasks start, appended to ``starts``."""
    more = np.cumsum(np.array(counts or [0], np.int64)[template_of])
    return np.concatenate([starts, starts[-1] + more])


def as_tasks(numbers: IntArray) -> Tasks:
    """Return ascending task numbers as a range if they are consecutive."""
    first, n = int(numbers[0]), len(numbers)
    return range(first, first + n) if int(numbers[-1]) - first + 1 == n else numbers


def as_index(tasks: Tasks) -> slice | IntArray:
    """Return the index of these tasks' rows in a numpy column."""
    return slice(tasks.start, tasks.stop) if isinstance(tasks, range) else tasks


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
