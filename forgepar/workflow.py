"""Declaring: callables become tasks of a workflow, handles in their arguments become its edges.

A million tasks are a few columns, not a million objects: a task is a number, and its row says which template it has
(callable, options and what stands where in the arguments), which constants and which references to other tasks.
"""

from __future__ import annotations

import inspect
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from types import MethodType
from typing import Any, NamedTuple, overload

from forgepar.arguments import ATOMS, CONSTANT, NESTED, REFERENCE, Hole, HoleRun, Layout, lift
from forgepar.binding import refusal
from forgepar.errors import CyclicWorkflow, DuplicateTaskName, EmptyWorkflow, WorkflowError
from forgepar.handles import TaskHandle, TaskHandles, foreign
from forgepar.pickling import Found
from forgepar.tasks import Options, Task, base_name, is_prepared, own_task, unfold
from forgepar.validation import as_list, check_instance, shown


@dataclass(frozen=True, slots=True)
class Spec:
    """One callable with one set of options, as tasks refer to it."""

    fn: Callable[..., Any]
    options: Options
    base: str

    def without_handles(self) -> Spec:
        """Return the same without the handles among its options."""
        if not self.options.after:
            return self
        fn = self.fn.options(after=()) if isinstance(self.fn, Task) else self.fn
        return Spec(fn, replace(self.options, after=()), self.base)


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """What tasks declared alike share: a spec, a layout, and constants that all of them get by keyword."""

    spec: int
    layout: Layout
    shared: Mapping[str, Any]


class Branching(NamedTuple):
    """Tasks of which those of one range run: ``then`` if the value of ``gate`` is true, else ``otherwise``.

    What waits for the other range is skipped, but ``join``, and what waits for the one that runs as well.
    """

    gate: int
    then: range
    otherwise: range
    join: int

    def shifted(self, n: int) -> Branching:
        """Return the same of tasks whose numbers are ``n`` higher."""
        then, otherwise = (range(part.start + n, part.stop + n) for part in (self.then, self.otherwise))
        return Branching(self.gate + n, then, otherwise, self.join + n)


class Engine:
    """What `Workflow` needs of rooms that rank above it: they put it here when they are imported."""

    freeze: Callable[[Workflow], Any]
    run: Callable[[Workflow, dict[str, Any]], Any]
    check: Callable[[Workflow, dict[str, Any]], Sequence[Any]]
    include: Callable[[Workflow, Workflow, Mapping[str, Any], str | None], Any]
    fan_out: Callable[[Workflow, Any, Sequence[Any], Mapping[str, Any]], TaskHandle]
    draw: Callable[[Workflow, str, dict[str, Any]], str]
    from_graph: Callable[[Workflow, Any, Any, Sequence[str]], Workflow]


class Workflow:
    """A graph of tasks.

    A copy of a workflow, by `copy`, `copy.deepcopy` or pickle, is a workflow of its own: handles of the original do not
    belong to it. Look them up by name: ``copy.handle("load-0")``.

    Args:
        name: what reports call it.

    Attributes:
        identity: differs between any two workflows, whatever their names; a `RunResult` knows its workflow by it.
        refers_to: functions and classes that constants of its tasks hold in a pickled form; None: there are none.

    Example:
        >>> wf = Workflow("sums")
        >>> squares = wf.map(pow, [1, 2, 3], [2, 2, 2])
        >>> total = wf.add(sum, squares)
        >>> wf.execution_layers()
        [['pow-0', 'pow-1', 'pow-2'], ['sum']]
        >>> wf.run(backend="inline")[total]
        14
    """

    def __init__(self, name: str = "workflow") -> None:
        check_instance("name", name, str, "text")
        self.name = name
        self.identity = _new_identity()
        self.refers_to: Found | None = None
        self.specs: list[Spec] = []
        self.templates: list[TemplateRow] = []
        # One row a task:
        self.template_of = array("i")
        self.ordinal_of = array("i")  # which of its base name's tasks; -1 is the first, named by the base alone
        # One row a constant and a reference, task by task:
        self.constants: list[Any] = []
        self.references = array("i")
        # Order without data:
        self.before = array("i")
        self.after = array("i")
        self.branchings: list[Branching] = []
        self.explicit_names: dict[int, str] = {}
        self._names_taken: set[str] = set()
        self._counters: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}  # what is before a slash in a name; the last number given to each
        self._n_looked_at = 0  # how many of the counters have been looked at for them
        self._spec_of: dict[Any, int] = {}
        self._template_index: dict[Any, int] = {}
        self._plan: Any = None

    def __len__(self) -> int:
        return len(self.template_of)

    def __getstate__(self) -> dict[str, Any]:
        # Objects are known by their ids, which do not travel; nor do handles, whose order is in the columns.
        state = {
            **self.__dict__,
            "_plan": None,
            "_spec_of": {},
            "specs": [spec.without_handles() for spec in self.specs],
        }
        del state["identity"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An identity of its own: the original and its copies may grow apart, and a handle is a number only.
        self.__dict__.update(state, identity=_new_identity())

    def __copy__(self) -> Workflow:
        """Return a workflow with columns of its own, so that neither grows with the other."""
        twin = object.__new__(type(self))
        state = self.__getstate__()
        columns = {name: copy(value) for name, value in state.items() if isinstance(value, (list, dict, set, array))}
        twin.__setstate__(state | columns)
        return twin

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r} of {len(self)} tasks>"

    def add(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskHandle:
        """Add one task.

        Args:
            fn: a function, a `Task` where it needs options, or a `Command`.
            *args: its arguments. Handles in them, at any depth of lists, tuples, dict values and dataclasses, become
                the values of their tasks.
            **kwargs: likewise.

        Returns:
            The task's handle.

        Raises:
            DuplicateTaskName: another task has the name that the options give.
            ForeignHandle: a handle of another workflow.
            WorkflowError: ``fn`` cannot be a task.

        Example:
            >>> wf = Workflow()
            >>> one = wf.add(int, "1")
            >>> wf.add(max, [one, 5], default=0).name
            'max'
        """
        spec = self._spec(fn)
        if spec < 0:
            fn, kwargs = unfold(fn, len(args), kwargs)
            return self.add(fn, *args, **kwargs)
        constants: list[Any] = []
        references: list[int] = []
        keywords = tuple(kwargs)
        try:
            kinds = [self._place(value, constants, references) for value in args]
            kinds += [self._place(value, constants, references) for value in kwargs.values()]
        except RecursionError:
            raise _too_deep(fn) from None
        key = (spec, tuple(kinds), keywords)
        template = self._template_index.get(key)
        if template is None:
            template = self._new_template(key, TemplateRow(spec, Layout(key[1], keywords), {}))
        index = len(self.template_of)
        options = self.specs[spec].options
        if options is not _NO_OPTIONS:
            self._declare_options(index, options)
        self.template_of.append(template)
        self.constants += constants
        self.references.extend(references)
        self.ordinal_of.append(self._next_ordinal(spec))
        self._plan = None
        return TaskHandle(self, index)

    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any], **constants: Any) -> TaskHandles: ...
    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: TaskHandle, **constants: Any) -> TaskHandle: ...
    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any] | TaskHandle, **constants: Any) -> Any: ...
    def map(self, fn: Callable[..., Any], /, *iterables: Any, **constants: Any) -> TaskHandles | TaskHandle:
        """Add one task for each item, or for each row of items of several iterables of one length.

        Args:
            fn: a function, a `Task` where it needs options, or a `Command`.
            *iterables: positional arguments, one item a task. Items may be handles, or hold some. A handle in the
                place of an iterable stands for a list that is known only when the workflow runs: the tasks are added
                then, and what this returns is one handle, for the list of their values.
            **constants: given to every task by keyword, as they were given here. They travel to a worker once a run.
                What cannot be changed (numbers, text, tuples of such, functions, large arrays) is one object to all
                tasks that it runs; of anything else each task gets a copy of its own. They hold no handles.

        Returns:
            The tasks' handles, in the order of the items; as an argument they stand for the list of all values. Where
            an iterable is a handle: one handle, which stands for that list.

        Raises:
            WorkflowError: no iterable, iterables of unequal length, or a handle among the constants.
            ForeignHandle: a handle of another workflow.

        Example:
            >>> wf = Workflow()
            >>> parsed = wf.map(int, ["7", "11"], base=8)
            >>> [handle.name for handle in parsed]
            ['int-0', 'int-1']
        """
        if any(isinstance(column, TaskHandle) for column in iterables):
            if not is_prepared(fn):
                self._check_arguments(fn, len(iterables), tuple(constants))
            return Engine.fan_out(self, fn, iterables, constants)
        spec = self._spec(fn)
        if spec < 0:
            fn, constants = unfold(fn, len(iterables), constants)
            unfolded: TaskHandles = self.map(fn, *iterables, **constants)
            return unfolded
        columns = [
            column
            if isinstance(column, (TaskHandles, range))
            else as_list(f"iterables[{place}] of map()", column, _ITEMS, WorkflowError)
            for place, column in enumerate(iterables)
        ]
        n_tasks = self._common_length(fn, columns)
        for name, value in constants.items():
            self._refuse_handles(name, value)
        first = len(self.template_of)
        options, base = self.specs[spec].options, self.specs[spec].base
        self.refuse_foreign(options.after)
        if all(map(_is_even, columns)):
            self._map_even(spec, columns, n_tasks, constants)
        else:
            try:
                self._map_uneven(spec, columns, constants)
            except RecursionError:
                raise _too_deep(fn) from None
        for index in range(first, first + n_tasks) if options.after else ():
            self._wait_for(index, options.after)
        start = self._counters.get(base, 0)
        self.ordinal_of.extend(range(start, start + n_tasks))
        self._counters[base] = start + n_tasks
        self._plan = None
        return TaskHandles(self, range(first, first + n_tasks))

    @classmethod
    def from_graph(
        cls, graph: Any, fn: Callable[..., Any] | str = "fn", *, attributes: Sequence[str] = (), name: str = "workflow"
    ) -> Workflow:
        """Make a workflow of a directed graph: a task for each node, which gets the values of those that lead to it.

        Args:
            graph: a ``networkx.DiGraph`` or ``MultiDiGraph``, a ``rustworkx.PyDiGraph``, or an `Adjacency`.
            fn: called for each node as ``fn(node, *values)``: the node as the graph has it (rustworkx: its payload,
                `Adjacency`: its number), and one value for each edge into it, in the order in which these were added
                (`Adjacency`: by number). Or the name of the attribute that holds each node's own function, or task
                with options, which is called as ``fn(*values)``; with rustworkx the payload may be the function.
            attributes: names of node attributes to give by keyword, where a node has them.
            name: what reports call the workflow.

        Returns:
            A workflow of as many tasks as the graph has nodes, named ``str(node)`` (rustworkx: the payload where that
            is text, else the index; `Adjacency`: as tasks are named by themselves, function and number).

        Raises:
            WorkflowError: this is no directed graph, or a node has no function.
            DuplicateTaskName: two nodes read the same.

        Example:
            >>> from forgepar import Adjacency
            >>> def add(node, *values):
            ...     return node + sum(values)
            >>> wf = Workflow.from_graph(Adjacency.from_edges(3, [0, 1], [2, 2]), add)
            >>> wf.run(backend="inline")["add-2"]
            3
        """
        return Engine.from_graph(cls(name), graph, fn, attributes)

    def include(
        self, other: Workflow, bindings: Mapping[str, Any] | None = None, *, prefix: str | None = None, **more: Any
    ) -> Any:
        """Add all tasks of another workflow, which stays as it is.

        Args:
            other: the workflow.
            bindings: what to have instead of some of its tasks, by their names: handles of this workflow, or values.
                What such a task waited for is included all the same.
            prefix: their names here begin with it and a slash. None: the other's name, with a number if need be.
            **more: further bindings.

        Returns:
            A mapping from names and handles of the other's tasks to handles here: an `Included`.

        Raises:
            UnknownTask: a binding for a task that the other does not have.
            DuplicateTaskName: the prefix was given, and is taken.
            ForeignHandle: a binding to a handle of a third workflow.
            WorkflowError: a binding for what joins two branches, a prefix that is empty, or the workflow itself.

        Example:
            >>> inner = Workflow("inner")
            >>> number = inner.add(int, "7")
            >>> square = inner.add(pow, number, 2)
            >>> outer = Workflow("outer")
            >>> included = outer.include(inner, int=outer.add(abs, -3))
            >>> outer.execution_layers()
            [['abs'], ['inner/pow']]
            >>> outer.run(backend="inline")[included[square]]
            9
        """
        check_instance("other", other, Workflow, "a Workflow", WorkflowError)
        if bindings is not None:
            check_instance("bindings", bindings, Mapping, "a dict of names and values, or None", WorkflowError)
        if prefix is not None:
            check_instance("prefix", prefix, str, "text, or None", WorkflowError)
        return Engine.include(self, other, {**(bindings or {}), **more}, prefix)

    def take_item(self, handle: TaskHandle, index: Any) -> TaskHandle:
        """Add a task that takes an item of a task's value, as ``handle[index]`` does."""
        return self.add(own_task(operator.getitem), handle, index)

    def changed(self) -> None:
        """Note that the columns have changed, so that the plan is made anew."""
        self._plan = None

    @property
    def counters(self) -> Mapping[str, int]:
        """How many tasks were named after each base."""
        return self._counters

    def adopt_names(self, explicit: Mapping[int, str], counters: Mapping[str, int]) -> None:
        """Take in names that were given to tasks, and how many were named after each base, of another workflow."""
        self.explicit_names.update(explicit)
        self._names_taken.update(explicit.values())
        self._counters.update(counters)

    def has_prefix(self, prefix: str) -> bool:
        """Tell whether names of tasks begin with a prefix and a slash."""
        for name in islice(self._counters, self._n_looked_at, None):  # they are only ever appended
            for at, letter in enumerate(name):
                if letter == "/":
                    self._prefixes.setdefault(name[:at], 0)
        self._n_looked_at = len(self._counters)
        return prefix in self._prefixes

    def new_prefix(self, prefix: str) -> str:
        """Return a prefix that no task has yet: the given one, or that with the next free number."""
        found = prefix
        while self.has_prefix(found):
            self._prefixes[prefix] += 1  # so that the next search goes on where this one ended
            found = f"{prefix}-{self._prefixes[prefix]}"
        return found

    def add_dependency(self, task: TaskHandle | str, after: TaskHandle | str) -> None:
        """Make a task wait for another, though it takes no value from it.

        Args:
            task: the handle or name of the task that waits.
            after: the handle or name of the one it waits for.

        Raises:
            CyclicWorkflow: a task would wait for itself. Longer cycles are found when the workflow is run.
            UnknownTask: no task of that name.
            ForeignHandle: a handle of another workflow.
        """
        waits, first = self.index_of(task), self.index_of(after, argument="after")
        if waits == first:
            name = self.task_name(waits)
            raise CyclicWorkflow(f"task {name!r} would wait for itself. Name another task.", cycle=[name])
        self.before.append(first)
        self.after.append(waits)
        self._plan = None

    def index_of(self, task: TaskHandle | str, *, argument: str = "task") -> int:
        """Return a task's number from its handle or name.

        Args:
            task: the handle or the name.
            argument: what to call it in an error.

        Raises:
            UnknownTask: no task of that name.
            ForeignHandle: a handle of another workflow.
        """
        if isinstance(task, TaskHandle):
            self.refuse_foreign([task])
            return task.index
        if not isinstance(task, str):
            raise WorkflowError(f"{argument}={shown(task)} names no task. Give one handle, or a task's name.")
        found: int = self.plan().find(task)
        return found

    def task_name(self, index: int) -> str:
        """Return the name of a task from its number."""
        if name := self.explicit_names.get(index):
            return name
        base = self.specs[self.templates[self.template_of[index]].spec].base
        ordinal = self.ordinal_of[index]
        return base if ordinal < 0 else f"{base}-{ordinal}"

    def handle(self, name: str) -> TaskHandle:
        """Return the handle of a task from its name.

        Raises:
            UnknownTask: no task of that name.
        """
        check_instance("name", name, str, "the name of a task", WorkflowError)
        return TaskHandle(self, self.index_of(name))

    def execution_layers(self) -> list[list[str]]:
        """Return the names of the tasks of each layer, in the order of their declaration.

        A task's layer is the length of the longest path to it from a task that waits for nothing.

        Raises:
            EmptyWorkflow: there is no task.
            CyclicWorkflow: tasks wait for each other in a circle.
        """
        self.check_runnable()
        return [[self.task_name(i) for i in layer] for layer in self.plan().tasks_by_layer()]

    def check_runnable(self) -> None:
        """Raise what is wrong with the workflow, before anything runs.

        Raises:
            EmptyWorkflow: there is no task.
            CyclicWorkflow: tasks wait for each other in a circle.
            DuplicateTaskName: a name that was given is also one that was derived.
        """
        if not len(self):
            raise EmptyWorkflow(f"workflow {self.name!r} has no task. Add one with Workflow.add or map.")
        plan = self.plan()
        plan.check_names()
        plan.layers  # noqa: B018  (they cannot be had of a cycle)

    def check(
        self,
        *,
        workers: int | None = None,
        layer_timeout: float | None = None,
        rollback: Any = "all",
        available_memory: int | str | None = None,
    ) -> Sequence[Any]:
        """Return what is likely to go wrong, or slower than need be, each with its mend; nothing runs.

        A cycle, with its path; names that two tasks have; order without data that makes layers more; layers narrower
        than the workers; tasks without a timeout of their own under ``layer_timeout``; declared memory that cannot be
        had; tasks with ``effects`` and no ``compensate``, if a rollback may come to them; constants of `map` that cost
        each of many tasks a copy. Order that no layer is lost by is not told of, nor that of a task behind one with
        ``effects``.

        Args:
            workers: how many workers the run would have; None: one for each CPU this process may use.
            layer_timeout: as of the run.
            rollback: as of the run.
            available_memory: what all tasks that run at once may take together where the workflow is to run, bytes or
                text such as "64GiB"; None: what there is here.

        Returns:
            A `Finding` each; those with ``is_fatal`` would keep a run from starting.

        Raises:
            ValueError: an argument that a run would refuse, too.

        Example:
            >>> wf = Workflow()
            >>> [finding.kind for finding in wf.check()]
            ['empty']
        """
        rules = {
            "workers": workers,
            "layer_timeout": layer_timeout,
            "rollback": rollback,
            "available_memory": available_memory,
        }
        return Engine.check(self, rules)

    def diagram(
        self,
        form: str = "svg",
        *,
        collapse: bool | None = None,
        direction: str | None = None,
        table: Any = None,
    ) -> str:
        """Draw the workflow by its layers, as text of an SVG file, a Mermaid flow chart or a Graphviz graph.

        Args:
            form: "svg", "mermaid" or "dot".
            collapse: whether all tasks of a layer that call the same function are one box with their number; None: if
                there are more than 100 tasks or 400 dependencies.
            direction: in which layers follow each other, "down" or "right"; None: as it fits a page better.
            table: the `RunTable` of a run of this workflow, by what became of whose tasks to colour it.

        Raises:
            EmptyWorkflow: there is no task.
            CyclicWorkflow: tasks wait for each other in a circle.
            ValueError: another form or direction, or a table of another workflow.

        Example:
            >>> wf = Workflow("sums")
            >>> total = wf.add(sum, [wf.add(abs, -3)])
            >>> print(wf.diagram("mermaid", direction="down"))
            flowchart TD
              subgraph layer0["layer 0"]
                b0["abs"]
              end
              subgraph layer1["layer 1"]
                b1["sum"]
              end
              b0 --> b1
            <BLANKLINE>
        """
        return Engine.draw(self, form, {"collapse": collapse, "direction": direction, "table": table})

    def _repr_svg_(self) -> str | None:
        """Show the workflow as a picture in a notebook; one that is empty or has a cycle cannot be drawn."""
        try:
            return self.diagram("svg")
        except (EmptyWorkflow, CyclicWorkflow):
            return None

    def plan(self) -> Any:
        """Return the workflow frozen as a `Plan`; made anew only when the workflow has changed."""
        if self._plan is None:
            self._plan = Engine.freeze(self)
        return self._plan

    def run(self, **rules: Any) -> Any:
        """Run the workflow with an executor of its own.

        Args:
            **rules: arguments of `WorkflowExecutor` (``workers``, ``backend``, ``start_method``) and of its ``run``
                (``outputs``, ``fail_fast``).

        Returns:
            A `RunResult`.

        Raises:
            WorkflowError: the workflow cannot be run as it is; nothing was started.
            WorkflowFailed: a task failed; ``.result`` has what was done.
        """
        return Engine.run(self, rules)

    def _spec(self, fn: Callable[..., Any]) -> int:
        # A bound method is a new object at each look, so it is known by its parts. The spec keeps them alive: ids last.
        key = (id(fn.__self__), id(fn.__func__)) if type(fn) is MethodType else id(fn)
        known = self._spec_of.get(key)
        if known is not None:
            return known
        options = fn.task_options if isinstance(fn, Task) else _NO_OPTIONS
        plain = fn.fn if isinstance(fn, Task) else fn
        if not callable(plain):
            raise WorkflowError(f"fn={shown(plain)} cannot be a task: it is not callable. Give a function.")
        if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
            raise WorkflowError(
                f"{base_name(plain)!r} is an async function, which workers do not await. "
                "Wrap it: def f(*args): return asyncio.run(coroutine(*args))."
            )
        if is_prepared(plain):
            return _PREPARED
        if options == _NO_OPTIONS:
            options = _NO_OPTIONS
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
        """Raise where a task's function does not take what the task gives it."""
        fault = refusal(fn.fn if isinstance(fn, Task) else fn, n_positional, keywords)
        if fault is None:
            return
        base, (text, unknown) = base_name(fn), fault
        remedy = "Give what it takes."
        if unknown in Options.__dataclass_fields__:
            remedy = f"If the option of tasks is meant, say fp.task({base}).options({unknown}=...)."
        raise WorkflowError(f"task {base!r} cannot be called with the arguments it is given: {text}. {remedy}")

    def _next_ordinal(self, spec: int) -> int:
        base = self.specs[spec].base
        count = self._counters.get(base, 0)
        self._counters[base] = count + 1
        return count or -1

    def _place(self, value: Any, constants: list[Any], references: list[int]) -> int:
        """Sort one argument into constants or references and return its kind."""
        kind = type(value)
        if kind is TaskHandle:
            if value.workflow is not self:
                raise foreign(value, self.name, _IN_ONE)
            references.append(value.index)
            return REFERENCE
        if kind in ATOMS:
            constants.append(value)
            return CONSTANT
        held = len(references)
        lifted = lift(value, lambda part: self._take(part, references))
        constants.append(lifted)
        return CONSTANT if lifted is value else NESTED + len(references) - held

    def _take(self, part: Any, references: list[int]) -> Hole | HoleRun | None:
        """Give the hole for a handle or a run of them, and note what it refers to."""
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
            raise WorkflowError(f"map({base_name(fn)}) got no items. Give one iterable for each positional argument.")
        if len(lengths) > 1:
            raise WorkflowError(
                f"map({base_name(fn)}) got iterables of unequal lengths {lengths}. Make them equally long."
            )
        return lengths[0]

    def _refuse_handles(self, name: str, value: Any) -> None:
        found: list[int] = []
        if lift(value, lambda part: self._take(part, found)) is not value:
            raise WorkflowError(
                f"map() got a handle in its constant {name!r}, which all tasks share. "
                "Give it as an iterable, [handle] * n, or add the tasks one by one."
            )

    def _map_even(self, spec: int, columns: Sequence[Sequence[Any]], n_tasks: int, shared: Mapping[str, Any]) -> None:
        """Add tasks whose columns hold either constants alone or handles alone: column by column, in C."""
        kinds = tuple(REFERENCE if isinstance(column, TaskHandles) else CONSTANT for column in columns)
        self.refuse_foreign(column for column in columns if isinstance(column, TaskHandles))
        constants = [column for column, kind in zip(columns, kinds, strict=True) if kind == CONSTANT]
        handles = [column.indices for column in columns if isinstance(column, TaskHandles)]
        template = self._new_template(None, TemplateRow(spec, Layout(kinds, ()), shared))
        self.template_of.extend([template] * n_tasks)
        self.constants.extend(_interleaved(constants))
        self.references.extend(_interleaved(handles))

    def _map_uneven(self, spec: int, columns: Sequence[Sequence[Any]], shared: Mapping[str, Any]) -> None:
        """Add tasks that differ in where their handles stand."""
        templates: dict[tuple[int, ...], int] = {}
        all_constants: list[Any] = []
        all_references: list[int] = []
        chosen: list[int] = []
        for row in zip(*columns, strict=True):
            references: list[int] = []
            kinds = tuple([self._place(value, all_constants, references) for value in row])
            all_references += references
            if kinds not in templates:
                templates[kinds] = self._new_template(None, TemplateRow(spec, Layout(kinds, ()), shared))
            chosen.append(templates[kinds])
        self.template_of.extend(chosen)
        self.constants += all_constants
        self.references.extend(all_references)

    def _declare_options(self, index: int, options: Options) -> None:
        self.refuse_foreign(options.after)
        if options.name is not None:
            if options.name in self._names_taken:
                raise DuplicateTaskName(
                    f"a task named {options.name!r} is there already. Give each its own name=, or none.",
                    name=options.name,
                )
            self._names_taken.add(options.name)
            self.explicit_names[index] = options.name
        self._wait_for(index, options.after)

    def refuse_foreign(self, handles: Iterable[TaskHandle | TaskHandles]) -> None:
        """Raise `ForeignHandle` where one of the handles is another workflow's."""
        for handle in handles:
            if handle.workflow is not self:
                raise foreign(handle, self.name, _IN_ONE)

    def _wait_for(self, index: int, handles: Iterable[TaskHandle | TaskHandles]) -> None:
        for handle in handles:
            first = [handle.index] if isinstance(handle, TaskHandle) else handle.indices
            self.before.extend(first)
            self.after.extend([index] * len(first))


_NO_OPTIONS = Options()
_ITEMS = "iterable, one item a task; what is the same for all goes by keyword (its parameter's name, and =)"
_IN_ONE = "Declare both tasks in one workflow, or include one in the other."
_PREPARED = -1  # in place of a spec's number: something else is to be called; see `unfold`


def _too_deep(fn: Callable[..., Any]) -> WorkflowError:
    return WorkflowError(
        f"an argument of task {base_name(fn)!r} is nested too deeply to be searched for handles and pickled. Give it "
        "flatter, or have the task make it."
    )


def _is_even(column: Sequence[Any]) -> bool:
    """Tell whether a column of a map is handles alone, or atoms alone."""
    return isinstance(column, (TaskHandles, range)) or ATOMS.issuperset(map(type, column))


def _interleaved(columns: Sequence[Iterable[Any]]) -> Iterable[Any]:
    """Yield the items of columns of one length row by row."""
    if len(columns) == 1:
        return columns[0]
    return (item for row in zip(*columns, strict=True) for item in row)


def _new_identity() -> bytes:
    """Return bytes that no other workflow has, in any process; a plan that has them keeps no workflow alive."""
    return os.urandom(16)
