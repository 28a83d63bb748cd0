"""A run and its tasks as columns, in the same form from a result and from a store.

RunResult.table ──┐
├──> RunTable ──> reports, traces, exports, the simulator
StoredRun.table ──┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import check_count
from forgepar.scheduling.run_state import Status
from forgepar.version import public

IntArray = NDArray[np.int32]


def counts_by_status(status_of: NDArray[np.int8]) -> dict[str, int]:
    """Count the tasks of each status that occurs."""
    counts = np.bincount(status_of, minlength=len(Status)).tolist()
    return {status.name.lower(): n for status, n in zip(Status, counts, strict=True) if n}


@public
class FailedAttempt(NamedTuple):
    """A failed attempt of a task, whether or not the task was retried.

    Attributes:
        task: the number of the task.
        attempt: the number of the attempt, from 1.
        start: when it began, in seconds since the run began; nan if unknown.
        seconds: how long it took; nan if unknown.
        worker: the slot that it ran on, -1 if unknown.
        error: class and text of the exception.
        traceback: the traceback, including the worker's; empty if the task was retried.
    """

    task: int
    attempt: int
    start: float
    seconds: float
    worker: int
    error: str
    traceback: str


@public
@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a run.

    Attributes:
        layer: its number.
        n_tasks: number of tasks that ran in it.
        wall_seconds: from the start of its first task to the end of its last.
        longest_seconds: duration of its longest task.
        longest_task: the name of that task.
        work_seconds: sum of the durations of its tasks.
    """

    layer: int
    n_tasks: int
    wall_seconds: float
    longest_seconds: float
    longest_task: str
    work_seconds: float


@public
@dataclass(frozen=True, eq=False)
class RunTable:
    """A run as columns: row i is task i, in the order of declaration.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        status: the status of the run: "running", "completed", "failed", "cancelled" or "interrupted".
        schedule: "layers" or "eager".
        n_workers: number of workers.
        began_at: when the run began, in seconds since the epoch (UTC).
        wall_seconds: how long the run took, or has taken so far.
        cpu_seconds: CPU time of its workers.
        peak_rss: largest resident memory of a worker, in bytes.
        names: (n,) names of the tasks.
        callables: names of the functions that tasks call.
        callable_of: (n,) int32, index into ``callables``.
        layer: (n,) int32.
        status_of: (n,) int8, a `forgepar.Status`; PENDING if nothing is known yet.
        start: (n,) float64, when the last attempt began, in seconds since the run began; nan if the task did not run.
        seconds: (n,) float64, how long that attempt took; nan if the task did not run.
        worker: (n,) int32, the slot that it ran on; -1 if the task did not run.
        attempt: (n,) int32, the number of that attempt; 0 if the task did not run.
        bytes: (n,) int64, size of the serialized value; 0 for None, numbers and short text.
        sources: (m,) int32, for each dependency the task that is waited for.
        targets: (m,) int32, for each dependency the task that waits.
        failures: every failed attempt.
        errors: class and text of the exception of each failed task, by its number.
    """

    run_id: str
    workflow: str
    status: str
    schedule: str
    n_workers: int
    began_at: float
    wall_seconds: float
    cpu_seconds: float
    peak_rss: int
    names: Sequence[str]
    callables: Sequence[str]
    callable_of: IntArray
    layer: IntArray
    status_of: NDArray[np.int8]
    start: NDArray[np.float64]
    seconds: NDArray[np.float64]
    worker: IntArray
    attempt: IntArray
    bytes: NDArray[np.int64]
    sources: NDArray[np.integer[Any]]
    targets: NDArray[np.integer[Any]]
    failures: Sequence[FailedAttempt] = ()
    errors: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one dict per task: name, callable, layer, status, start, seconds, worker, attempt, bytes, error."""
        columns = self.columns()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))

    def columns(self) -> dict[str, list[Any]]:
        """Return lists of equal length by name, as ``pandas.DataFrame`` and similar classes take them.

        Example:
            >>> from forgepar import Workflow
            >>> wf = Workflow()
            >>> _ = wf.map(abs, range(3))
            >>> wf.run(backend="inline").table().columns()["name"]
            ['abs-0', 'abs-1', 'abs-2']
        """
        statuses = [status.name.lower() for status in Status]
        return {
            "name": list(self.names),
            "callable": [self.callables[number] for number in self.callable_of.tolist()],
            "layer": self.layer.tolist(),
            "status": [statuses[number] for number in self.status_of.tolist()],
            "start": self.start.tolist(),
            "seconds": self.seconds.tolist(),
            "worker": self.worker.tolist(),
            "attempt": self.attempt.tolist(),
            "bytes": self.bytes.tolist(),
            "error": [self.errors.get(task) for task in range(len(self))],
        }

    def status_counts(self) -> dict[str, int]:
        """Count the tasks of each status that occurs."""
        return counts_by_status(self.status_of)

    def ran(self) -> IntArray:
        """Return the numbers of the tasks that ran and ended."""
        return np.flatnonzero(np.isfinite(self.seconds)).astype(np.int32)

    def slowest(self, most: int = 10) -> IntArray:
        """Return the numbers of the tasks that took longest, the longest first."""
        check_count("most", most, 0)
        ran = self.ran()
        return ran[np.argsort(-self.seconds[ran], kind="stable")[:most]]

    def layer_table(self) -> list[LayerRow]:
        """Return one row per layer in which a task ran, with its wall time and its longest task."""
        ran = self.ran()
        by_layer = ran[np.argsort(self.layer[ran], kind="stable")]
        cuts = np.flatnonzero(np.diff(self.layer[by_layer])) + 1
        return [self._layer_row(tasks) for tasks in np.split(by_layer, cuts) if len(tasks)]

    def _layer_row(self, tasks: IntArray) -> LayerRow:
        start, seconds = self.start[tasks], self.seconds[tasks]
        longest = int(np.argmax(seconds))
        return LayerRow(
            int(self.layer[tasks[0]]),
            len(tasks),
            float((start + seconds).max() - start.min()),
            float(seconds[longest]),
            self.names[int(tasks[longest])],
            float(seconds.sum()),
        )
