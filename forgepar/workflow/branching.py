"""`when`: two branches, one of which runs, depending on a value that is known when the workflow runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forgepar._validate import check_callable, check_instance, shown
from forgepar.errors import WorkflowError, add_note
from forgepar.version import public
from forgepar.workflow.binding import call_error
from forgepar.workflow.columns import Branching
from forgepar.workflow.handles import TaskHandle
from forgepar.workflow.tasks import own_task
from forgepar.workflow.workflow import Workflow


@public
def when(
    workflow: Workflow,
    condition: TaskHandle,
    then: Callable[[], Any],
    otherwise: Callable[[], Any] | None = None,
) -> TaskHandle:
    """Declare two branches; when the workflow runs, a task's value decides which of them runs.

    The tasks of the other branch are skipped, as are those that depend on them, unless they also depend on the branch
    that runs: such a task gets None for each value of a skipped task.

    Args:
        workflow: the workflow to declare them in.
        condition: the handle of the value; a worker applies ``bool`` to it.
        then: declares the tasks to run if the value is true, and returns the handle (or list, tuple, dict of handles)
            for the branch's value. Every task that is declared during the call belongs to the branch.
        otherwise: declares the tasks to run if it is false; None for no tasks and the value None.

    Returns:
        The handle of a task with the value of the branch that ran.

    Raises:
        ForeignHandle: a handle belongs to another workflow.

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
    for name, declare in (("then", then), ("otherwise", otherwise)):
        if declare is not None and (error := call_error(declare, 0, ())) is not None:
            raise WorkflowError(
                f"{name} must be callable without arguments, got {shown(declare)}: {error[0]}. Pass a function that "
                "declares the tasks of the branch and returns the handle of its value."
            )
    gate = workflow.add(own_task(_condition), condition)
    first = _declared(workflow, gate, "then", then)
    second = _declared(workflow, gate, "otherwise", otherwise) if otherwise is not None else (range(0), None)
    join = workflow.add(own_task(_either), gate, first[1], second[1])
    workflow.branchings.append(Branching(gate.index, first[0], second[0], join.index))
    return join


def _declared(workflow: Workflow, gate: TaskHandle, name: str, declare: Callable[[], Any]) -> tuple[range, Any]:
    """Call a function that declares tasks; return these, which now wait for the gate, and what it returned."""
    begin = len(workflow)
    try:
        value = declare()
    except Exception as error:
        add_note(error, f"raised by the argument {name} of when()")
        raise
    tasks = range(begin, len(workflow))
    workflow.before.extend([gate.index] * len(tasks))
    workflow.after.extend(tasks)
    return tasks, value


def _condition(value: Any) -> bool:
    return bool(value)


def _either(decision: bool, then: Any, otherwise: Any) -> Any:
    return then if decision else otherwise


_condition.__name__, _either.__name__ = "condition", "either"  # task names
