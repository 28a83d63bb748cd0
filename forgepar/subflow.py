"""Workflows that a task makes while the run goes, to be run in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgepar.errors import WorkflowError
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.tasks import Task, base_name, own_task
from forgepar.workflow import Engine, Workflow


class Subflow:
    """A workflow that a task returns: its tasks join the run, and its output becomes the task's value.

    They are in the layers behind the task's own, named ``task/name``, and like all others: recorded, retried, undone.
    What waits for the task waits for them. A subflow's tasks may return subflows.

    Args:
        workflow: the tasks. It is not to be changed any more.
        output: what stands for the task's value: a handle, or handles inside of lists, tuples, dicts; None: the list of
            the values that no other of its tasks takes.

    Raises:
        WorkflowError: there is no workflow.
        ForeignHandle: the output is another workflow's.

    Example:
        >>> def halves(n):
        ...     inner = Workflow()
        ...     parts = inner.map(abs, [n // 2, n - n // 2])
        ...     return Subflow(inner, inner.add(sum, parts))
        >>> wf = Workflow()
        >>> whole = wf.add(halves, 7)
        >>> wf.run(backend="inline")[whole]
        7
    """

    def __init__(self, workflow: Workflow, output: Any = None) -> None:
        if not isinstance(workflow, Workflow):
            raise WorkflowError(
                f"Subflow({workflow!r}) has no workflow. Give it a Workflow, and what stands for its value."
            )
        if output is None:
            taken = set(workflow.references)
            output = [TaskHandle(workflow, index) for index in range(len(workflow)) if index not in taken]
        self.workflow = workflow
        workflow.add(own_task(_output), output)


def _output(value: Any) -> Any:
    return value


_output.__name__ = "output"  # what the task is called


class _FanOut:
    """Declares a task an item of lists that are known only when it runs."""

    def __init__(self, fn: Any, name: str) -> None:
        self.fn = fn
        self.__name__ = name

    def __call__(self, *columns: Any, **constants: Any) -> Subflow:
        inner = Workflow()
        return Subflow(inner, inner.map(self.fn, *map(list, columns), **constants))

    def __forgepar_fingerprint__(self) -> Any:
        is_plain = isinstance(self.fn, Task) and self.fn.task_options.version is None
        return self.fn.fn if is_plain else self.fn  # no other option counts, nor what the tasks are called


def _fan_out(workflow: Workflow, fn: Any, columns: Sequence[Any], constants: Mapping[str, Any]) -> TaskHandle:
    """Declare what fans out; the function's own options are those of the tasks to come."""
    options: dict[str, Any] = {}
    name = base_name(fn)
    if isinstance(fn, Task):
        options = {"after": fn.task_options.after, "cache": fn.task_options.cache}
        name = fn.task_options.name or name
        fn = fn.options(after=(), name=name)
    lists = [list(column) if isinstance(column, TaskHandles) else column for column in columns]
    return workflow.add(own_task(_FanOut(fn, name)).options(**options), *lists, **constants)


Engine.fan_out = _fan_out
