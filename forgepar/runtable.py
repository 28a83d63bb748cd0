"""What is known of a run and each of its tasks, as columns: one shape, whether it comes from a result or from a store.

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

from forgepar.runstate import Status
from forgepar.validation import check_count

IntArray = NDArray[np.int32]


class FailedAttempt(NamedTuple):
    """One attempt of a task that failed, whether or not another one was made after it.

    Attributes:
        task: number of the task.
        attempt: which attempt, from 1.
        start: when it began, seconds since the run did; nan where that is not known.
        seconds: how long it took; nan where that is not known.
        worker: the slot that it ran on, -1 where that is not known.
        error: class and text of what it failed with.
        traceback: with the worker's; empty where it was tried again.
    """

    task: int
    attempt: int
    start: float
    seconds: float
    worker: int
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a run.

    Attributes:
        layer: which.
        n_tasks: how many tasks ran in it.
        wall_seconds: from the start of its first task to the end of its last.
        longest_seconds: duration of its longest task.
        longest_task: that task's name.
        work_seconds: sum of its tasks' durations.
    """

    layer: int
    n_tasks: int
    wall_seconds: float
    longest_seconds: float
    longest_task: str
    work_seconds: float


@dataclass(frozen=True, eq=False)
class RunTable:
    """A run as columns: row i is task i, in the order of declaration.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        status: of the run: "running", "completed", "failed", "cancelled" or "interrupted".
        schedule: "layers" or "eager".
        n_workers: how many workers it had.
        began_at: when it began, seconds since the epoch (UTC).
        wall_seconds: how long it took, or went so far.
        cpu_seconds: CPU time that its workers spent.
        peak_rss: largest resident memory of a worker, bytes.
        names: (n,) names of the tasks.
        callables: names of what they call.
        callable_of: (n,) int32, which of these.
        layer: (n,) int32.
        status_of: (n,) int8, a `forgepar.runstate.Status`; PENDING: nothing is known yet.
        start: (n,) float64, when the last attempt began, seconds since the run did; nan: it did not run.
        seconds: (n,) float64, how long that took; nan: it did not run.
        worker: (n,) int32, the slot that it ran on; -1: it did not run.
        attempt: (n,) int32, which attempt that was; 0: it did not run.
        bytes: (n,) int64, size of its value as it travelled; 0 for None, numbers and short text.
        sources: (m,) int32, what is waited for, an entry a dependency.
        targets: (m,) int32, what waits for it.
        failures: every attempt that failed.
        errors: class and text of what each failed task failed with.
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
        """Yield a dict a task: name, callable, layer, status, start, seconds, worker, attempt, bytes, error."""
        columns = self.columns()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))

    def columns(self) -> dict[str, list[Any]]:
        """Return lists of equal length by name, as ``pandas.DataFrame`` and its like take them.

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
        counts = np.bincount(self.status_of, minlength=len(Status)).tolist()
        return {status.name.lower(): n for status, n in zip(Status, counts, strict=True) if n}

    def ran(self) -> IntArray:
        """Return the tasks that ran to an end, by number."""
        return np.flatnonzero(np.isfinite(self.seconds)).astype(np.int32)

    def slowest(self, most: int = 10) -> IntArray:
        """Return the tasks that took longest, the longest first, by number."""
        check_count("most", most, 0)
        ran = self.ran()
        return ran[np.argsort(-self.seconds[ran], kind="stable")[:most]]

    def layer_table(self) -> list[LayerRow]:
        """Return a row a layer in which a task ran: its wall time beside its longest task."""
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
