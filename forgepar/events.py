"""What happens in a run, as frozen events, and the protocol of those who listen.

The names are those that users of the original engine know. A run numbers its events from 0 in the order in which its
process learnt of them, which for tasks that run side by side is not quite that in which they happened (``at``): a
worker tells of its tasks a batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        at: when, in seconds since the epoch (UTC).
        seq: its number in the run, from 0; -1 as long as no run has told it.
        run_id: the run's id.

    Example:
        >>> WorkflowTaskParallelStarted(0.0, 3, 20).time.isoformat()
        '1970-01-01T00:00:00+00:00'
    """

    at: float
    # By keyword, so that the fields of each kind follow its time.
    seq: int = field(default=-1, kw_only=True)
    run_id: str = field(default="", kw_only=True)

    @property
    def time(self) -> datetime:
        """When, as a `datetime` that knows it is UTC."""
        return datetime.fromtimestamp(self.at, UTC)


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
class WorkflowTaskStarted(Event):
    """A worker began an attempt of a task."""

    task: str
    layer: int
    attempt: int
    worker: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskCompleted(Event):
    """A task returned; ``seconds`` it took, its value has ``bytes`` as it travels (0 for None, numbers, short text)."""

    task: str
    attempt: int
    worker: int
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskRetried(Event):
    """An attempt failed with ``error``, or its worker ended before it reported it; ``attempt`` is the one to come."""

    task: str
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkflowTaskSkipped(Event):
    """A task will not run.

    Attributes:
        task: which.
        waited_for: the task that it waited for, directly or not, which failed, was left out, or chose another branch;
            None where it failed itself, and its fallback is to go on without it.
    """

    task: str
    waited_for: str | None


@dataclass(frozen=True, slots=True)
class WorkflowTaskCached(Event):
    """A task will not run, as an earlier run did it and its value was kept in the run store."""

    task: str


@dataclass(frozen=True, slots=True)
class WorkflowTaskFailed(Event):
    """A task failed for good."""

    task: str
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkflowToolFallback(Event):
    """A task failed, and a step of its fallback is taken instead; ``kind`` is "value", "call", "retry" or "skip"."""

    task: str
    attempt: int
    error: str
    fallback: str
    kind: str


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
class WorkflowDeadlockCheck(Event):
    """The graph was looked through for tasks that wait for each other, before anything ran: a run has no ``cycle``."""

    task_count: int
    layer_count: int
    cycle: tuple[str, ...] = ()


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
class WorkflowWorkerJoined(Event):
    """A worker that may be on another machine took work of the run from here on; ``pid`` is of that machine."""

    worker: int
    pid: int
    address: str


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


@dataclass(frozen=True, slots=True)
class UnknownEvent(Event):
    """An event of a kind that this version does not know, as a log of a newer one may have it.

    Attributes:
        name: its kind.
        fields: what else was written of it.
    """

    name: str
    fields: dict[str, object]


class Sink(Protocol):
    """Whoever listens to a run.

    It may have a ``flush()`` as well, which is called when the run is over, however it ended.
    """

    def write(self, events: Sequence[Event]) -> None:
        """Take in events, in order, those of a run in one thread.

        An exception stops nothing: it is reported by a `RuntimeWarning`, and the sink gets nothing more of this run.
        """
