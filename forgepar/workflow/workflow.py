"""`Workflow`: callables become tasks, and handles in their arguments become edges."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from forgepar._validate import as_list, check_instance
from forgepar.errors import CyclicWorkflow, EmptyWorkflow, WorkflowError
from forgepar.system.loading import loading
from forgepar.version import public
from forgepar.workflow.arguments import ArgumentLayout
from forgepar.workflow.columns import NO_OPTIONS, TaskColumns, TemplateRow, too_deep
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.tasks import is_prepared, own_task, unfold

if TYPE_CHECKING:
    from forgepar.engine.run_options import RunOptions
    from forgepar.records.result import RunResult
    from forgepar.workflow.checks import Finding
    from forgepar.workflow.combinators import Included
    from forgepar.workflow.plan import Plan
    from forgepar.workflow.subflow import Subflow

R = TypeVar("R")


@public
class Workflow(TaskColumns):
    """A graph of tasks.

    Copies of a workflow, by `copy`, `copy.deepcopy` or pickle, are independent. Handles of the original do not belong
    to a copy; look them up by name: ``copy.handle("load-0")``.

    Args:
        name: the workflow's name in reports.

    Attributes:
        identity: random bytes that differ between any two workflows, whatever their names. A `RunResult` has them.
        refers_to: functions and classes that the tasks' constants contain in pickled form; None if there are none.

    Example:
        >>> wf = Workflow("sums")
        >>> squares = wf.map(pow, [1, 2, 3], [2, 2, 2])
        >>> total = wf.add(sum, squares)
        >>> wf.execution_layers()
        [['pow-0', 'pow-1', 'pow-2'], ['sum']]
        >>> wf.run(backend="inline")[total]
        14
    """

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r} of {len(self)} tasks>"

    @overload
    def add(self, fn: Callable[..., Subflow], /, *args: Any, **kwargs: Any) -> TaskHandle[Any]: ...
    @overload
    def add(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> TaskHandle[R]: ...
    def add(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TaskHandle[Any]:
        """Add one task.

        Args:
            fn: a function, a `Task` (a function with options), or a `Command`.
            *args: positional arguments. Handles in them, at any depth of lists, tuples, dict values and dataclasses,
                are replaced by the values of their tasks.
            **kwargs: keyword arguments, likewise.

        Returns:
            The task's handle.

        Raises:
            DuplicateTaskName: another task has the name in the options.
            ForeignHandle: a handle belongs to another workflow.
            WorkflowError: ``fn`` cannot be a task, or does not take these arguments.

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
            raise too_deep(fn) from None
        key = (spec, tuple(kinds), keywords)
        template = self._template_index.get(key)
        if template is None:
            template = self._new_template(key, TemplateRow(spec, ArgumentLayout(key[1], keywords), {}))
        index = len(self.template_of)
        options = self.specs[spec].options
        if options is not NO_OPTIONS:
            self._declare_options(index, options)
        self.template_of.append(template)
        self.constants += constants
        self.references.extend(references)
        self.ordinal_of.append(self._next_ordinal(spec))
        self._plan = None
        return TaskHandle(self, index)

    @overload
    def map(self, fn: Callable[..., Subflow], /, *iterables: Iterable[Any], **constants: Any) -> TaskHandles[Any]: ...
    @overload
    def map(self, fn: Callable[..., R], /, *iterables: Iterable[Any], **constants: Any) -> TaskHandles[R]: ...
    @overload
    def map(self, fn: Callable[..., R], /, *iterables: TaskHandle, **constants: Any) -> TaskHandle[list[R]]: ...
    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any] | TaskHandle, **constants: Any) -> Any: ...
    def map(self, fn: Callable[..., Any], /, *iterables: Any, **constants: Any) -> TaskHandles | TaskHandle:
        """Add one task per item, or per row of items of several equally long iterables.

        Args:
            fn: a function, a `Task` (a function with options), or a `Command`.
            *iterables: positional arguments, one item per task. Items may be or contain handles. A handle instead of an
                iterable stands for a list that is known only when the workflow runs: the run adds the tasks then, and
                this method returns one handle, for the list of their values.
            **constants: keyword arguments of every task, without handles. They are sent to each worker once per run.
                Immutable constants (numbers, strings, tuples of these, functions, large arrays) are one object for all
                tasks of a worker; of other constants each task gets a copy.

        Returns:
            The tasks' handles, in the order of the items; as an argument they stand for the list of all values. If an
            iterable is a handle: one handle, for that list.

        Raises:
            WorkflowError: there is no iterable, the iterables differ in length, or a constant contains a handle.
            ForeignHandle: a handle belongs to another workflow.

        Example:
            >>> wf = Workflow()
            >>> parsed = wf.map(int, ["7", "11"], base=8)
            >>> [handle.name for handle in parsed]
            ['int-0', 'int-1']
        """
        if any(isinstance(column, TaskHandle) for column in iterables):
            if not is_prepared(fn):
                self._check_arguments(fn, len(iterables), tuple(constants))
            with loading:
                from forgepar.workflow.subflow import fan_out

            return fan_out(self, fn, iterables, constants)
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
        return TaskHandles(self, self._append_map(fn, spec, columns, constants))

    @classmethod
    def from_graph(
        cls, graph: Any, fn: Callable[..., Any] | str = "fn", *, attributes: Sequence[str] = (), name: str = "workflow"
    ) -> Workflow:
        """Make a workflow from a directed graph: one task per node, which gets the values of its predecessors.

        Args:
            graph: a ``networkx.DiGraph`` or ``MultiDiGraph``, a ``rustworkx.PyDiGraph``, or an `Adjacency`.
            fn: called for each node as ``fn(node, *values)``: the node as it is in the graph (rustworkx: its payload;
                `Adjacency`: its number), and one value per incoming edge, in the order in which the edges were added
                (`Adjacency`: by number). Or the name of a node attribute with the node's own function or task, which is
                called as ``fn(*values)``; with rustworkx the payload may be the function.
            attributes: names of node attributes to pass as keyword arguments, for nodes that have them.
            name: the workflow's name in reports.

        Returns:
            A workflow with one task per node, named ``str(node)`` (rustworkx: the payload if it is a string, else the
            index; `Adjacency`: the function's name and the node's number).

        Raises:
            WorkflowError: the argument is not a directed graph, or a node has no function.
            DuplicateTaskName: two nodes have the same name.

        Example:
            >>> from forgepar import Adjacency
            >>> def add(node, *values):
            ...     return node + sum(values)
            >>> wf = Workflow.from_graph(Adjacency.from_edges(3, [0, 1], [2, 2]), add)
            >>> wf.run(backend="inline")["add-2"]
            3
        """
        with loading:
            from forgepar.workflow.from_graph import declare_graph

        return declare_graph(cls(name), graph, fn, attributes)

    def include(
        self, other: Workflow, bindings: Mapping[str, Any] | None = None, *, prefix: str | None = None, **more: Any
    ) -> Included:
        """Add all tasks of another workflow, which does not change.

        Args:
            other: the workflow to include.
            bindings: by task name, the handles of this workflow or values that replace tasks of the other. The tasks
                that a replaced task waited for are included nevertheless.
            prefix: the included tasks are named ``prefix/name``. None for the other's name, with a number if that is
                in use.
            **more: further bindings.

        Returns:
            An `Included`: a mapping from the other's task names and handles to handles of this workflow.

        Raises:
            UnknownTask: a binding for a task that the other does not have.
            DuplicateTaskName: the given prefix is in use.
            ForeignHandle: a binding to a handle of a third workflow.
            WorkflowError: a binding for a task that joins two branches, an empty prefix, or ``other`` is this workflow.

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
            check_instance("prefix", prefix, str, "a string or None", WorkflowError)
        with loading:
            from forgepar.workflow.combinators import include

        return include(self, other, {**(bindings or {}), **more}, prefix)

    def take_item(self, handle: TaskHandle, index: Any) -> TaskHandle:
        """Add a task that gets an item of a task's value, as ``handle[index]`` does."""
        return self.add(own_task(operator.getitem), handle, index)

    def add_dependency(self, task: TaskHandle | str, after: TaskHandle | str) -> None:
        """Make a task wait for another task without taking its value.

        Args:
            task: the handle or name of the task that waits.
            after: the handle or name of the task that runs first.

        Raises:
            CyclicWorkflow: a task would wait for itself. Longer cycles are found when the workflow runs.
            UnknownTask: there is no task of that name.
            ForeignHandle: a handle belongs to another workflow.
        """
        waits, first = self.index_of(task), self.index_of(after, argument="after")
        if waits == first:
            name = self.task_name(waits)
            raise CyclicWorkflow(f"Task {name!r} cannot wait for itself. Name another task.", cycle=[name])
        self.before.append(first)
        self.after.append(waits)
        self._plan = None

    def index_of(self, task: TaskHandle | str, *, argument: str = "task") -> int:
        """Return a task's number from its handle or name.

        Args:
            task: the handle or name.
            argument: the argument's name in errors.

        Raises:
            UnknownTask: there is no task of that name.
            ForeignHandle: the handle belongs to another workflow.
        """
        if isinstance(task, TaskHandle):
            self.refuse_foreign([task])
            return task.index
        check_instance(argument, task, str, "a handle or the name of a task", WorkflowError)
        found: int = self.plan().find(task)
        return found

    def handle(self, name: str) -> TaskHandle:
        """Return the handle of the task with this name.

        Raises:
            UnknownTask: there is no task of that name.
        """
        check_instance("name", name, str, "the name of a task", WorkflowError)
        return TaskHandle(self, self.index_of(name))

    def execution_layers(self) -> list[list[str]]:
        """Return the task names of each layer, in order of declaration.

        The layer of a task is the length of the longest path to it from a task without dependencies.

        Raises:
            EmptyWorkflow: the workflow has no task.
            CyclicWorkflow: the dependencies have a cycle.
        """
        self.check_runnable()
        return [[self.task_name(i) for i in layer] for layer in self.plan().tasks_by_layer()]

    def check_runnable(self) -> None:
        """Raise an error if the workflow cannot run.

        Raises:
            EmptyWorkflow: the workflow has no task.
            CyclicWorkflow: the dependencies have a cycle.
            DuplicateTaskName: an explicit name equals one that was derived from a callable.
        """
        if not len(self):
            raise EmptyWorkflow(f"Workflow {self.name!r} has no tasks. Add one with Workflow.add or Workflow.map.")
        plan = self.plan()
        plan.check_names()
        plan.layers  # noqa: B018  (raises if there is a cycle)

    def check(
        self,
        *,
        workers: int | None = None,
        layer_timeout: float | None = None,
        rollback: Any = "all",
        available_memory: int | str | None = None,
    ) -> Sequence[Finding]:
        """Return likely errors and slowdowns, each with its remedy, without running anything.

        Finds a cycle, with its path; names of two tasks; dependencies without data that add layers; layers narrower
        than the workers; tasks without a timeout under ``layer_timeout``; more declared memory than available; tasks
        with ``effects`` but no ``compensate`` that a rollback may reach; constants of `map` that are copied for each of
        many tasks. Does not report dependencies that add no layer, or on a task with ``effects``.

        Args:
            workers: the number of workers; None for one per CPU that this process may use.
            layer_timeout: as for the run.
            rollback: as for the run.
            available_memory: memory for all tasks that run at once on the machine of the run, in bytes or as a string
                such as "64GiB"; None for the memory of this machine.

        Returns:
            Findings; a run cannot start while any of them has ``is_fatal``.

        Raises:
            ValueError: an argument that a run would not accept either.

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
        with loading:
            from forgepar.workflow.checks import check

        return check(self, **rules)

    def diagram(
        self,
        form: str = "svg",
        *,
        collapse: bool | None = None,
        direction: str | None = None,
        table: Any = None,
    ) -> str:
        """Draw the workflow by layer; return an SVG file, a Mermaid flow chart or a Graphviz graph as text.

        Args:
            form: "svg", "mermaid" or "dot".
            collapse: draw the tasks of a layer that call the same function as one box with their count; None to do so
                for more than 100 tasks or 400 dependencies.
            direction: of the layers, "down" or "right"; None for the one that fits a page better.
            table: the `RunTable` of a run of this workflow; its statuses colour the tasks.

        Raises:
            EmptyWorkflow: the workflow has no task.
            CyclicWorkflow: the dependencies have a cycle.
            ValueError: ``form`` or ``direction`` is not one of these, or the table is of another workflow.

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
        with loading:
            from forgepar.report.graph.diagram import draw

        return draw(self, form, collapse=collapse, direction=direction, table=table)

    def _repr_svg_(self) -> str | None:
        """Return the diagram for notebooks; None if the workflow is empty or has a cycle."""
        try:
            return self.diagram("svg")
        except (EmptyWorkflow, CyclicWorkflow):
            return None

    def plan(self) -> Plan:
        """Return the workflow frozen as a `Plan`; a new plan is made only after a change."""
        if self._plan is None:
            with loading:
                from forgepar.workflow.plan import Plan

            self._plan = Plan(self)
        plan: Plan = self._plan
        return plan

    def run(self, **rules: Unpack[RunOptions]) -> RunResult:
        """Run the workflow with an executor that is closed after the run.

        Args:
            **rules: arguments of `WorkflowExecutor` (``workers``, ``backend``, ``start_method``) and of its ``run``
                (``outputs``, ``fail_fast``).

        Returns:
            A `RunResult`.

        Raises:
            WorkflowError: the workflow cannot run; nothing was started.
            WorkflowFailed: a task failed; ``.result`` has the results so far.
        """
        with loading:
            from forgepar.engine.executor import run_alone

        return run_alone(self, rules)


_ITEMS = "iterable, with one item per task; pass what is the same for all tasks by keyword"
