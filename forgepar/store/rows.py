"""The rows that a run writes to its store, made from what the run records.

    events, tasks of replies, values ──> RunRows ──> PendingRows ──> one transaction of `forgepar.store.writer`

Values are stored by fingerprint. A value that its fingerprint does not describe is not stored: that of a task which
used a fallback, or was undone by a rollback, and those of all tasks that depend on it.
"""

from __future__ import annotations

import math
import pickle
import sqlite3
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forgepar.records.audit_log import line_of
from forgepar.records.events import (
    Event,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskRetried,
    WorkflowTaskRolledBack,
    WorkflowTaskSkipped,
    WorkflowToolFallback,
)
from forgepar.records.keeper import EARLIER_RUN, TasksNotRun
from forgepar.records.ledger import Ledger
from forgepar.scheduling.run_state import Status
from forgepar.store.blobs import Written
from forgepar.store.columns import insert_all, pack_integers, pack_texts, plain_text
from forgepar.store.fingerprint.tasks import Fingerprints
from forgepar.store.resume import BLOB, FILE, SCALAR, CachedResults, checksum_of, payload_of_file
from forgepar.values.codec import Wire
from forgepar.workflow.plan import Plan, Tasks, as_index

_UPDATE_STATUS = "UPDATE tasks SET status = ? WHERE run = ? AND task = ?"
_DELETE_VALUE = 'DELETE FROM "values" WHERE fingerprint = ?'


@dataclass
class PendingRows:
    """Rows that the next transaction writes.

    Attributes:
        tasks, attempts, events, values: rows to insert into the tables of these names.
        undone: status, run and task of tasks that were rolled back.
        forgotten: fingerprints of values to delete.
    """

    tasks: list[tuple[Any, ...]] = field(default_factory=list)
    attempts: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    values: list[tuple[Any, ...]] = field(default_factory=list)
    undone: list[tuple[Any, ...]] = field(default_factory=list)
    forgotten: list[tuple[Any, ...]] = field(default_factory=list)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write the rows within a transaction."""
        self.values.sort()  # so that neighbours in the file are written one after the other
        for table in ("tasks", "attempts", "events", "values"):
            insert_all(connection, table, getattr(self, table))
        connection.executemany(_UPDATE_STATUS, self.undone)
        connection.executemany(_DELETE_VALUE, self.forgotten)


class RunRows:
    """Makes the rows of one run.

    Args:
        plan: the workflow.
        fingerprints: of its tasks.
        cached: the values of earlier runs.

    Attributes:
        pending: rows that are not written yet.
        tainted: (n_tasks,) tasks whose values their fingerprints do not describe.
        ends_layer: whether a layer has ended since this was last set to False.
    """

    def __init__(self, plan: Plan, fingerprints: Fingerprints, cached: CachedResults) -> None:
        self.pending = PendingRows()
        self.tainted = np.zeros(plan.n_tasks, np.bool_)
        self.ends_layer = False
        self._plan = plan
        self._fingerprints = fingerprints
        self._cached = cached
        self._forgotten: set[int] = set()
        self._run = 0

    def begin(self, run: int, ledger: Ledger) -> None:
        """Begin a run.

        Args:
            run: its number in the store.
            ledger: the columns of the run.
        """
        self._run, self._ledger = run, ledger

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that has more tasks; the fingerprints have them already."""
        n = self._plan.n_tasks
        self._plan = plan
        self.tainted = np.append(self.tainted, np.zeros(plan.n_tasks - n, np.bool_))
        parents = [task for task, last in plan.alias.items() if last >= n]
        if self.tainted[parents].any():
            self.tainted[n:] = True

    def is_stored(self, task: int) -> bool:
        """Return whether the value of a task is to be stored."""
        return self._fingerprints.of_task[task] is not None and not self.tainted[task]

    # Values

    def add_values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Add the values that tasks returned, except those that a `FileWriter` writes."""
        run, of_task, tainted, rows = self._run, self._fingerprints.of_task, self.tainted, self.pending.values
        is_any_tainted = tainted.any()
        for task, value in zip(tasks if isinstance(tasks, range) else tasks.tolist(), values, strict=False):
            fingerprint = of_task[task]
            if fingerprint is None or (is_any_tainted and tainted[task]):
                continue
            if type(value) is not tuple:
                kind, payload = SCALAR, pickle.dumps(value, 5)
            elif type(value[0]) is bytes:
                kind, payload = BLOB, value[0]
            else:
                continue
            rows.append((fingerprint, run, kind, checksum_of(fingerprint, kind, payload), payload))

    def add_file(self, written: Written) -> None:
        """Add the value of a task that is in a file now."""
        fingerprint = self._fingerprints.of_task[written.key]
        if fingerprint is not None and not self.tainted[written.key]:
            payload = payload_of_file(written.name, written.lengths)
            checksum = checksum_of(fingerprint, FILE, payload)
            self.pending.values.append((fingerprint, self._run, FILE, checksum, payload))

    # Tasks

    def add_completed(self, tasks: Tasks, seq: int | None) -> None:
        """Add tasks that completed.

        Args:
            tasks: which; the ledger has their columns.
            seq: number of the first of their events, which are made from the rows; None: the events are stored.
        """
        ledger, rows = self._ledger, as_index(tasks)
        run, of_task, began, attempts = self._run, self._fingerprints.of_task, ledger.began, ledger.attempts
        columns = (ledger.start[rows] - began, ledger.duration[rows], ledger.worker[rows], ledger.bytes[rows])
        tainted = self.tainted if self.tainted.any() else None
        status, add = int(Status.COMPLETED), self.pending.tasks.append
        numbers = tasks if isinstance(tasks, range) else tasks.tolist()
        for task, start, seconds, worker, n_bytes in zip(
            numbers, *(column.tolist() for column in columns), strict=True
        ):
            fingerprint = of_task[task] if tainted is None or not tainted[task] else None
            attempt = attempts.get(task, 1) if attempts else 1
            add((run, task, status, fingerprint, None, seq, attempt, start, seconds, worker, n_bytes, None))
            if seq is not None:
                seq += 2

    def add_not_run(self, entry: TasksNotRun, seq: int) -> None:
        """Add tasks that did not run; ``seq`` is the number of the first of their events."""
        of_task, at = self._fingerprints.of_task, entry.at - self._ledger.began_at
        is_cached = entry.cause == EARLIER_RUN
        status = int(Status.CACHED if is_cached else Status.SKIPPED)
        for number, task in enumerate(entry.tasks.tolist(), seq):
            fingerprint, source = (of_task[task], self._cached.source(task)) if is_cached else (None, entry.cause)
            self.pending.tasks.append(
                (self._run, task, status, fingerprint, source, number, 0, at, None, None, 0, None)
            )

    def add_event(self, event: Event) -> None:
        """Add an event, and what it states about a task."""
        self.pending.events.append((self._run, event.seq, line_of(event)))
        find = self._plan.find
        match event:
            case WorkflowTaskParallelCompleted():
                self.ends_layer = True
            case WorkflowTaskCompleted():
                task = find(event.task)
                self.add_completed(range(task, task + 1), None)
            case WorkflowTaskSkipped():
                self._add_skipped(find(event.task))
            case WorkflowTaskRetried():
                self._add_failure(event.task, event.attempt - 1, event.error)
            case WorkflowToolFallback():
                self._add_failure(event.task, event.attempt, event.error)
                if event.kind != "retry":
                    self._taint(find(event.task))
            case WorkflowTaskFailed():
                self._add_failure(event.task, event.attempt, event.error, is_final=True)
            case WorkflowTaskRolledBack(error=None):
                task = find(event.task)
                self.pending.undone.append((int(Status.COMPENSATED), self._run, task))
                self._forget(task)

    def _add_skipped(self, task: int) -> None:
        """Add a task that failed and that its fallback skips."""
        attempt = self._ledger.attempts.get(task, 1)
        row = (int(Status.SKIPPED), None, None, None, attempt, *self._last_attempt(task), 0, None)
        self.pending.tasks.append((self._run, task, *row))

    def _add_failure(self, name: str, attempt: int, error: str, *, is_final: bool = False) -> None:
        task = self._plan.find(name)
        at, error, found = self._last_attempt(task), plain_text(error), self._ledger.errors.get(task)
        trace = "" if found is None or not is_final else plain_text("".join(traceback.format_exception(found)))
        self.pending.attempts.append((self._run, task, attempt, *at, error, trace))
        if is_final:
            row = (int(Status.FAILED), None, None, None, attempt, *at, 0, error)
            self.pending.tasks.append((self._run, task, *row))

    def _last_attempt(self, task: int) -> tuple[float | None, float | None, int]:
        """Return when the last attempt of a task began, its duration and its worker."""
        ledger = self._ledger
        return _finite(ledger.start[task] - ledger.began), _finite(ledger.duration[task]), int(ledger.worker[task])

    def _taint(self, task: int) -> None:
        """Mark a task, and all tasks that depend on it, as not described by their fingerprints.

        Dependents of a tainted task are tainted already, so all calls together visit each task once.
        """
        tainted, graph, left = self.tainted, self._plan.graph, [task]
        while left:
            one = left.pop()
            if not tainted[one]:
                tainted[one] = True
                left += graph.successors(one).tolist()

    def _forget(self, task: int) -> None:
        """Delete the stored values of a task that was undone and of all tasks that depend on it."""
        left = [task]
        while left:
            one = left.pop()
            if one not in self._forgotten:
                self._forgotten.add(one)
                self.tainted[one] = True  # its file may not be written yet
                self.pending.forgotten.append((self._fingerprints.of_task[one],))
                left += self._plan.graph.successors(one).tolist()


def plan_columns(plan: Plan) -> tuple[bytes, ...]:
    """Return the columns of table ``runs`` that describe a plan: callables, names of tasks, and edges."""
    callables, callable_of = plan.called()
    spec_of = np.array([row.spec for row in plan.templates], np.int32)[plan.template_of]
    given = {task: name for task, name in plan.given_names.items() if name != plan.spec(task).base}
    return (
        pack_texts(callables),
        pack_integers(callable_of),
        pack_texts([spec.base for spec in plan.specs]),
        pack_integers(spec_of),
        pack_integers(plan.ordinals),
        pack_texts([text for task, name in given.items() for text in (str(task), name)]),
        pack_integers(*plan.graph.edges()),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
