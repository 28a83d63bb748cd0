"""What follows from the outcomes of tasks: what `RunState` hands back, for others to act on or to write down."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from forgepar.plan import IntArray


class LayerStarted(NamedTuple):
    """Effect: the tasks of a layer may run now."""

    layer: int
    n_tasks: int


class LayerCompleted(NamedTuple):
    """Effect: every task of a layer is settled."""

    layer: int
    n_tasks: int


class Retried(NamedTuple):
    """Effect: a task that failed is to be tried again."""

    task: int
    attempt: int


class FellBack(NamedTuple):
    """Effect: a task failed for good, and has a fallback of which this step is to be taken."""

    task: int
    attempt: int
    step: int


class TaskFailed(NamedTuple):
    """Effect: a task failed for good."""

    task: int
    attempt: int


class Skipped(NamedTuple):
    """Effect: tasks will not run: what they wait for failed or was left out, or a gate is against them (``cause``)."""

    tasks: IntArray
    cause: int


class Halted(NamedTuple):
    """Effect: nothing more is handed out; what runs is to be ended."""


Effect: TypeAlias = LayerStarted | LayerCompleted | Retried | FellBack | TaskFailed | Skipped | Halted
