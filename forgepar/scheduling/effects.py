"""The effects of task outcomes: `RunState` returns them, and the engine acts on them and records them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from forgepar.workflow.plan import IntArray


class LayerStarted(NamedTuple):
    """Effect: the tasks of a layer may run now."""

    layer: int
    n_tasks: int


class LayerCompleted(NamedTuple):
    """Effect: every task of a layer is settled."""

    layer: int
    n_tasks: int


class Retried(NamedTuple):
    """Effect: a failed task will be retried."""

    task: int
    attempt: int


class FellBack(NamedTuple):
    """Effect: a task failed and is not retried; ``step`` of its fallback runs next."""

    task: int
    attempt: int
    step: int


class TaskFailed(NamedTuple):
    """Effect: a task failed, and is neither retried nor replaced by a fallback."""

    task: int
    attempt: int


class Skipped(NamedTuple):
    """Effect: tasks will not run, because ``cause`` failed or was skipped, or is a gate that chose the other branch."""

    tasks: IntArray
    cause: int


class Halted(NamedTuple):
    """Effect: the run was halted. No more tasks are handed out, and running tasks are to be stopped."""


Effect: TypeAlias = LayerStarted | LayerCompleted | Retried | FellBack | TaskFailed | Skipped | Halted
