"""`Subflow`: a workflow that a task returns during the run, to run in the place of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgepar._validate import check_instance
from forgepar.errors import WorkflowError
from forgepar.version import public
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.tasks import Task, base_name, own_task
from forgepar.workflow.workflow import Workflow


@public
class Subflow:
    """A workflow that a task returns: its tasks join the run, and its output becomes the task's value.

    They are in the layers after the task's own and are named ``task/name``. They are recorded, retried and undone like
    other tasks, and may return subflows. Tasks that wait for the task wait for them too.

    Args:
        workflow: the tasks. Do not change it afterwards.
        output: the task's value: a handle, or handles in lists, tuples, dicts; None for the list of the values that no
            other task of the subflow takes.

    Raises:
        WorkflowError: the first argument is not a workflow.
        ForeignHandle: the output belongs to another workflow.

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
        check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
        if output is None:
            taken = set(workflow.references)
            output = [TaskHandle(workflow, index) for index in range(len(workflow)) if index not in taken]
        self.workflow = workflow
        workflow.add(own_task(_output), output)


def _output(value: Any) -> Any:
    return value


_output.__name__ = "output"  # the task's name


class _FanOut:
    """Task that declares one task per item of lists that are known only when it runs."""

    def __init__(self, fn: Any, name: str) -> None:
        self.fn = fn
        self.__name__ = name

    def __call__(self, *columns: Any, **constants: Any) -> Subflow:
        inner = Workflow()
        return Subflow(inner, inner.map(self.fn, *map(list, columns), **constants))

    def __forgepar_fingerprint__(self) -> Any:
        is_plain = isinstance(self.fn, Task) and self.fn.task_options.version is None
        return self.fn.fn if is_plain else self.fn  # other options and the tasks' names do not count


def fan_out(workflow: Workflow, fn: Any, columns: Sequence[Any], constants: Mapping[str, Any]) -> TaskHandle:
    """Declare a task that adds one task per item; the function's options apply to the added tasks."""
    options: dict[str, Any] = {}
    name = base_name(fn)
    if isinstance(fn, Task):
        options = {"after": fn.task_options.after, "cache": fn.task_options.cache}
        name = fn.task_options.name or name
        fn = fn.options(after=(), name=name)
    lists = [list(column) if isinstance(column, TaskHandles) else column for column in columns]
    return workflow.add(own_task(_FanOut(fn, name)).options(**options), *lists, **constants)
