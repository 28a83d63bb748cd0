"""What happens in a run, as frozen events, and the protocol of those who listen.

The names are those that users of the original engine know. A sink gets events in the order in which they happened, in
batches, between the dispatcher's other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        at: when, in seconds since the epoch (UTC).
    """

    at: float


@dataclass(frozen=True, slots=True)
class WorkflowStarted(Event):
    """A run began."""

    workflow: str
    task_count: int
    layer_count: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskParallelStarted(Event):
    """The tasks of a layer may run."""

    layer_index: int
    task_count: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskParallelCompleted(Event):
    """Every task of a layer is settled."""

    layer_index: int
    task_count: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskRetried(Event):
    """A task failed and is tried again."""

    task: str
    attempt: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskFailed(Event):
    """A task failed for good."""

    task: str
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkflowToolFallback(Event):
    """A task failed, and a step of its fallback is taken instead."""

    task: str
    attempt: int
    error: str
    fallback: str


@dataclass(frozen=True, slots=True)
class WorkflowTasksAdded(Event):
    """A task returned a workflow, whose tasks joined the run; ``layer_count`` is that of all there is now."""

    task: str
    task_count: int
    layer_count: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskRolledBack(Event):
    """A task that was done was undone, or (``error``) could not be."""

    task: str
    error: str | None


@dataclass(frozen=True, slots=True)
class WorkflowRolledBack(Event):
    """All that was done and can be undone was, but for what failed to be."""

    compensated: int
    failed: int
    without_compensation: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskTimedOut(Event):
    """An attempt took longer than the task's timeout; its worker is being ended."""

    task: str
    attempt: int
    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkflowTaskMemoryExceeded(Event):
    """A task had more memory (``used``, bytes) than it declares (``limit``); its worker is being ended."""

    task: str
    attempt: int
    worker: int
    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class WorkflowMemoryLow(Event):
    """Less than a twentieth of all memory is available, so nothing is handed out until more is; bytes."""

    available: int
    total: int


@dataclass(frozen=True, slots=True)
class WorkflowDeadlockTimeout(Event):
    """The run (``layer_index`` -1), or a layer of it, took longer than it was given, and is being ended."""

    layer_index: int
    seconds: float
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkflowCancelled(Event):
    """The run was called off: nothing more is handed out, and what runs comes to its end, or is ended (``kills``)."""

    kills: bool
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkflowWorkerDied(Event):
    """A worker process ended in the course of the run."""

    worker: int
    pid: int
    exit_code: int | None
    task: str | None


@dataclass(frozen=True, slots=True)
class WorkflowValueSpilled(Event):
    """A large value went to disk, as the memory budget was used up or shared memory was full; told once a run.

    Attributes:
        task: whose value it was.
        folder: where on disk it is.
        budget: most bytes that the run may hold in shared memory.
    """

    task: str
    folder: str
    budget: int


@dataclass(frozen=True, slots=True)
class WorkflowCompleted(Event):
    """A run ended, with all tasks completed (``succeeded``) or not."""

    succeeded: bool
    completed: int
    failed: int


class Sink(Protocol):
    """Whoever listens to a run."""

    def write(self, events: Sequence[Event]) -> None:
        """Take in events. An exception is raised to the caller of the run."""
