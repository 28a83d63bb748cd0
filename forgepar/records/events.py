"""Events of a run, as frozen dataclasses, and the protocol of sinks, which receive them.

The names are those that users of the original engine know. A run numbers its events from 0 in the order in which its
process received them. For tasks that run in parallel this may differ from the order of their times (``at``), as
workers report their tasks in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from forgepar.version import public


@public
@dataclass(frozen=True, slots=True)
class Event:
    """Base class of the events of a run.

    Attributes:
        at: when it happened, in seconds since the epoch (UTC).
        seq: its number in the run, from 0; -1 before a run has numbered it.
        run_id: the id of the run.

    Example:
        >>> WorkflowTaskParallelStarted(0.0, 3, 20).time.isoformat()
        '1970-01-01T00:00:00+00:00'
    """

    at: float
    # Keyword-only, so that subclasses can add positional fields.
    seq: int = field(default=-1, kw_only=True)
    run_id: str = field(default="", kw_only=True)

    @property
    def time(self) -> datetime:
        """The time as a `datetime` in UTC."""
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
    """Every task of a layer has completed, failed or will not run."""

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
    """A task returned after ``seconds``; ``bytes`` is the serialized size (0 for None, numbers, short text)."""

    task: str
    attempt: int
    worker: int
    seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskRetried(Event):
    """An attempt failed with ``error``, or its worker ended before it reported; ``attempt`` is the next one."""

    task: str
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkflowTaskSkipped(Event):
    """A task will not run.

    Attributes:
        task: its name.
        waited_for: the task because of which it was skipped: a direct or indirect dependency that failed, was skipped
            or chose another branch. None if it failed itself and its fallback skips it.
    """

    task: str
    waited_for: str | None


@dataclass(frozen=True, slots=True)
class WorkflowTaskCached(Event):
    """A task will not run: an earlier run completed it, and the run store has its value."""

    task: str


@dataclass(frozen=True, slots=True)
class WorkflowTaskFailed(Event):
    """A task failed and is not retried."""

    task: str
    attempt: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkflowToolFallback(Event):
    """A task failed and takes the next step of its fallback; ``kind`` is "value", "call", "retry" or "skip"."""

    task: str
    attempt: int
    error: str
    fallback: str
    kind: str


@dataclass(frozen=True, slots=True)
class WorkflowTasksAdded(Event):
    """A task returned a workflow and its tasks joined the run, which has ``layer_count`` layers from now on."""

    task: str
    task_count: int
    layer_count: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskRolledBack(Event):
    """A completed task was undone, or its compensation failed with ``error``."""

    task: str
    error: str | None


@dataclass(frozen=True, slots=True)
class WorkflowRolledBack(Event):
    """The rollback ended: counts of tasks that were undone, failed to be, or have no compensation."""

    compensated: int
    failed: int
    without_compensation: int


@dataclass(frozen=True, slots=True)
class WorkflowTaskTimedOut(Event):
    """An attempt took longer than the timeout of the task; its worker is killed."""

    task: str
    attempt: int
    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkflowTaskMemoryExceeded(Event):
    """A task used more memory (``used``, bytes) than it declares (``limit``); its worker is killed."""

    task: str
    attempt: int
    worker: int
    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class WorkflowMemoryLow(Event):
    """Less than a twentieth of the memory is available, so no batch starts until there is more; in bytes."""

    available: int
    total: int


@dataclass(frozen=True, slots=True)
class WorkflowDeadlockCheck(Event):
    """The graph was searched for cycles before any task ran; ``cycle`` is empty in a run, which has none."""

    task_count: int
    layer_count: int
    cycle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkflowDeadlockTimeout(Event):
    """A layer, or the run (``layer_index`` -1), exceeded its time limit, and the run is ended."""

    layer_index: int
    seconds: float
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkflowCancelled(Event):
    """The run was cancelled: no more tasks start; running tasks are killed (``kills``) or may finish."""

    kills: bool
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkflowWorkerJoined(Event):
    """A worker that may be on another machine joined the run; ``pid`` is its process id there."""

    worker: int
    pid: int
    address: str


@dataclass(frozen=True, slots=True)
class WorkflowWorkerDied(Event):
    """A worker process ended during the run."""

    worker: int
    pid: int
    exit_code: int | None
    task: str | None


@dataclass(frozen=True, slots=True)
class WorkflowValueSpilled(Event):
    """A large value was written to disk, as the memory budget or shared memory was exhausted; sent once per run.

    Attributes:
        task: the task that returned the value.
        folder: the folder of the file.
        budget: the most shared memory that the run may use, in bytes.
    """

    task: str
    folder: str
    budget: int


@dataclass(frozen=True, slots=True)
class WorkflowCompleted(Event):
    """A run ended; ``succeeded`` is True if all tasks completed."""

    succeeded: bool
    completed: int
    failed: int


@dataclass(frozen=True, slots=True)
class UnknownEvent(Event):
    """An event of an unknown kind, from the log of a newer version.

    Attributes:
        name: its kind.
        fields: its other fields.
    """

    name: str
    fields: dict[str, object]


@public
class Sink(Protocol):
    """Receiver of the events of a run.

    A sink may also have a method ``flush()``, which is called when the run has ended in any way.
    """

    def write(self, events: Sequence[Event]) -> None:
        """Receive events in order, all of a run in the same thread.

        A sink that raises is dropped for the rest of the run, with a `RuntimeWarning`; the run continues.
        """
