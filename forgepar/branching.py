"""Tasks that run only if a value says so, known when the workflow runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forgepar.errors import WorkflowError
from forgepar.handles import TaskHandle
from forgepar.tasks import own_task
from forgepar.validation import check_callable, check_instance
from forgepar.workflow import Branching, Workflow


def when(
    workflow: Workflow,
    condition: TaskHandle,
    then: Callable[[], Any],
    otherwise: Callable[[], Any] | None = None,
) -> TaskHandle:
    """Declare two branches, of which one runs: which, a task's value decides.

    The tasks of the other branch are skipped, and so is what waits for them, unless it also waits for the branch that
    runs: such a task, which joins both, gets None for each value that there is not.

    Args:
        workflow: where to declare them.
        condition: the handle of the value; as by ``bool`` of it, on a worker.
        then: declares the tasks to run if it is true, all that are declared while this is called, and returns the
            handle (or list, tuple, dict of handles) that stands for the branch's value.
        otherwise: the same if it is not; None: nothing runs then, and the value is None.

    Returns:
        The handle of a task whose value is that of the branch that ran.

    Raises:
        ForeignHandle: a handle of another workflow.

    Example:
        >>> wf = Workflow()
        >>> size = wf.add(len, "abc")
        >>> short = wf.add(lambda n: n < 10, size)
        >>> value = when(wf, short, lambda: wf.add(str, size), lambda: wf.add(abs, size))
        >>> result = wf.run(backend="inline")
        >>> result[value], result.status_counts()
        ('3', {'completed': 5, 'skipped': 1})
    """
    check_instance("workflow", workflow, Workflow, "a Workflow", WorkflowError)
    check_callable("then", then, WorkflowError)
    if otherwise is not None:
        check_callable("otherwise", otherwise, WorkflowError)
    gate = workflow.add(own_task(_condition), condition)
    first = _declared(workflow, gate, then)
    second = _declared(workflow, gate, otherwise) if otherwise is not None else (range(0), None)
    join = workflow.add(own_task(_either), gate, first[1], second[1])
    workflow.branchings.append(Branching(gate.index, first[0], second[0], join.index))
    return join


def _declared(workflow: Workflow, gate: TaskHandle, declare: Callable[[], Any]) -> tuple[range, Any]:
    """Return the tasks that a function declares, which are to wait for the gate, and what it returns."""
    begin = len(workflow)
    value = declare()
    tasks = range(begin, len(workflow))
    workflow.before.extend([gate.index] * len(tasks))
    workflow.after.extend(tasks)
    return tasks, value


def _condition(value: Any) -> bool:
    return bool(value)


def _either(decision: bool, then: Any, otherwise: Any) -> Any:
    return then if decision else otherwise


_condition.__name__, _either.__name__ = "condition", "either"  # what the tasks are called
