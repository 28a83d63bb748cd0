"""The arguments of a run: their types and checks; and the error that a failed run raises."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict, cast

from forgepar._validate import (
    as_list,
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_seconds,
    has,
    is_flag,
    shown,
)
from forgepar.backends.base import Backend
from forgepar.engine.cancellation import CancellationToken
from forgepar.engine.console import Show
from forgepar.errors import RunTimeout, WorkflowError, WorkflowFailed, error_text
from forgepar.records.display import Display
from forgepar.records.result import RunResult
from forgepar.records.sinks import Audit
from forgepar.scheduling.rollback import Strategy
from forgepar.scheduling.run_state import RecycleLimits, RunPolicy
from forgepar.store.resume import Resume
from forgepar.workflow.handles import TaskHandle, TaskHandles
from forgepar.workflow.plan import Plan
from forgepar.workflow.workflow import Workflow

_MOST_NAMES = 5  # of tasks in a message
_OF_BACKENDS = ("open", "send", "wait", "close", "n_slots", "traits", "lock")
_OF_DISPLAYS = ("begin", "beat", "failed", "close", "look_at")


class RunOptions(TypedDict, total=False):
    """What `Workflow.run` takes: the arguments of `WorkflowExecutor` and of its ``run``."""

    workers: int | None
    backend: Literal["process", "inline"] | Backend
    start_method: str | None
    memory_budget: int | str | None
    max_tasks_per_worker: int | None
    max_worker_memory: int | str | None
    outputs: Literal["leaves", "all"] | TaskHandle | TaskHandles | Iterable[Any]
    schedule: Literal["layers", "eager"]
    fail_fast: bool
    rollback: Strategy
    timeout: float | None
    layer_timeout: float | None
    rollback_timeout: float | None
    seed: int
    cancel: CancellationToken | None
    show: Show
    audit: Audit
    store: str | os.PathLike[str] | None
    resume: bool | Resume
    progress: bool | Display | None


def checked_policy(workflow: Workflow, options: RunOptions, recycling: RecycleLimits) -> RunPolicy:
    """Return the rules of a run.

    Raises:
        ValueError: an option has a wrong value.
        WorkflowError: the workflow cannot be run, or ``outputs`` names no tasks of it.
    """
    check_instance("workflow", workflow, Workflow, "a Workflow")
    check_choice("schedule", options["schedule"], ("layers", "eager"))
    check_flag("fail_fast", options["fail_fast"])
    check_choice("rollback", options["rollback"], ("all", "upstream", "none"), or_callable=True)
    check_count("seed", options["seed"], 0)
    timeout = check_seconds("timeout", options["timeout"])
    layer_timeout = check_seconds("layer_timeout", options["layer_timeout"])
    rollback_timeout = check_seconds("rollback_timeout", options["rollback_timeout"])
    workflow.check_runnable()
    return RunPolicy(
        _output_tasks(workflow, options["outputs"]),
        options["schedule"],
        bool(options["fail_fast"]),  # not numpy's, which JSON does not have
        rollback=options["rollback"],
        timeout=timeout,
        layer_timeout=layer_timeout,
        rollback_seconds=timeout if rollback_timeout is None else rollback_timeout,
        seed=int(options["seed"]),
        recycling=recycling,
    )


def _output_tasks(workflow: Workflow, outputs: Any) -> Literal["leaves", "all"] | tuple[int, ...]:
    if isinstance(outputs, str) and outputs in ("leaves", "all"):
        return "leaves" if outputs == "leaves" else "all"
    try:
        return tuple(_named_tasks(workflow, outputs))
    except RecursionError:
        raise WorkflowError(
            f"outputs={shown(outputs)} is nested too deeply. Pass 'leaves', 'all', or a list of handles or names."
        ) from None


def not_a_backend(backend: object) -> str:
    """Return the message for what is given in place of a backend."""
    return f"backend must be 'process', 'inline' or a backend such as FuturesBackend(executor), got {shown(backend)}."


def checked_backend(backend: Any, **others: Any) -> Backend:
    """Return a backend that was made by the user; ``others`` are arguments for workers that forgepar starts."""
    if isinstance(backend, type) or not has(backend, *_OF_BACKENDS):
        raise ValueError(not_a_backend(backend))
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"{given[0]}= is for workers that forgepar starts, and the backend {backend.name!r} has its own. "
            f"Remove it, or pass it to the backend."
        )
    found: Backend = backend
    return found


def _named_tasks(workflow: Workflow, outputs: Any) -> Iterable[int]:
    if isinstance(outputs, (str, TaskHandle)):
        return (workflow.index_of(outputs),)
    if isinstance(outputs, TaskHandles):
        workflow.refuse_foreign([outputs])
        return outputs.indices
    if isinstance(outputs, Mapping) or not isinstance(outputs, Iterable):
        raise WorkflowError(f"outputs must be 'leaves', 'all', handles, or names of tasks, got {shown(outputs)}.")
    return (
        index
        for part in as_list("outputs", outputs, "handles or names of tasks", WorkflowError)
        for index in _named_tasks(workflow, part)
    )


def checked_resume(store: object, resume: bool | Resume) -> Resume | None:
    """Return how to resume; None for not at all."""
    if not isinstance(resume, (bool, Resume)):
        raise ValueError(f"resume must be True, False, or a forgepar.Resume, got {shown(resume)}.")
    if resume and store is None:
        raise ValueError(f"resume={shown(resume)} needs a store to take values from. Pass store='runs.db' as well.")
    return resume if isinstance(resume, Resume) else Resume() if resume else None


def checked_display(progress: object) -> bool | Display:
    """Return what is to show the progress of a run: False, True for the standard one, or a display."""
    if progress is None or is_flag(progress):  # numpy's flags, too
        return bool(progress)
    if isinstance(progress, type) or not has(progress, *_OF_DISPLAYS):
        raise ValueError(f"progress must be True, False, or a forgepar.Display, got {shown(progress)}.")
    return cast("Display", progress)


def failure_of(plan: Plan, result: RunResult, ended_by: RunTimeout | None) -> WorkflowFailed:
    """Return the error of a run that failed; a timeout that ended it comes first."""
    told = [f"{name!r} ({error_text(error)})" for name, error in list(result.errors.items())[:3]]
    if len(result.errors) > len(told):
        told.append(f"and {len(result.errors) - len(told)} more")
    message = (
        f"{len(result.errors)} of {plan.n_tasks} tasks of workflow {plan.workflow_name!r} failed: {', '.join(told)}; "
        ".result has what was done"
    )
    if ended_by is not None:
        message = f"{ended_by}; {message}"
    undone = result.rollback
    if undone.compensated or undone.failed:
        message += f"; rolled back {len(undone.compensated)} tasks"
        if undone.failed:
            names = ", ".join(map(repr, list(undone.failed)[:_MOST_NAMES]))
            more = len(undone.failed) - _MOST_NAMES
            message += f", but not {names}" + (f" and {more} more (.result.rollback.failed)" if more > 0 else "")
    failure = WorkflowFailed(message, [*([ended_by] if ended_by else []), *result.errors.values()])
    failure.result = result
    return failure
