"""Keeps a run in a store as it goes: the keeper of a run, between its loop and an SQLite file.

    values  ──> pending, mapped ──> FileWriter (large ones)
    take    ──> entries ──┐
                          └──> rows ──> one transaction, each fifth of a second ──> synced at the ends of layers

Nothing is done a task that can be done a batch, and nothing while workers wait. A transaction that fails is tried
again: what it has stays in memory until it is in.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import sqlite3
import time
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forgepar.audit import line_of
from forgepar.errors import StoreError, StoreWarning, WrongProcess
from forgepar.events import (
    Event,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskRetried,
    WorkflowTaskRolledBack,
    WorkflowTaskSkipped,
    WorkflowToolFallback,
)
from forgepar.fingerprint import Fingerprints
from forgepar.forking import in_child, keep_for_ever
from forgepar.holdings import kept_tasks
from forgepar.keeping import EARLIER_RUN, Entry, NotRun
from forgepar.lifelocks import hold, is_own, let_go
from forgepar.machine import start_time
from forgepar.plan import IntArray, Plan, Tasks, as_index
from forgepar.priors import BLOB, FILE, SCALAR, Priors, Resume, checksum_of, payload_of_file
from forgepar.result import Ledger
from forgepar.runlock import RunLock, life_file
from forgepar.runstate import RunPolicy, Status
from forgepar.sinks import report
from forgepar.storefile import (
    PATIENCE_SECONDS,
    as_store_error,
    files_of,
    insert_all,
    open_to_write,
    pack_integers,
    pack_texts,
    plain_text,
    python_version,
    telling,
)
from forgepar.validation import check_path
from forgepar.valuefiles import FileWriter, ValueFiles
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.version import __version__

_FLUSH_SECONDS = 0.2  # between two transactions, at least; a kill loses what was done in so long
_SYNC_SECONDS = 1.0  # between two that are synced, at most: a power cut loses what was done in so long
_MOST_SHARE = 20  # a transaction takes at most a twentieth of the time
_RETRY_SECONDS = 1.0  # until one that failed is tried again
_BUSY_SECONDS = 0.05  # how long a transaction waits for another program, while a run goes
_MOST_NAMED = 3  # names told of tasks that have one reason not to be kept

_UNDONE = "UPDATE tasks SET status = ? WHERE run = ? AND task = ?"
_FORGET = 'DELETE FROM "values" WHERE fingerprint = ?'
_RUN = (
    "INSERT INTO runs(run_id, workflow, status, began, seen, n_tasks, n_layers, workers, schedule, resumed, host, pid, "
    "pid_started, python, forgepar, callables, callable_of, bases, base_of, ordinals, given_names, edges) "
    "VALUES (?,?,'running',?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_GROWN = (
    "UPDATE runs SET n_tasks = ?, n_layers = ?, callables = ?, callable_of = ?, bases = ?, base_of = ?, "
    "ordinals = ?, given_names = ?, edges = ? WHERE id = ?"
)
_SEEN = "UPDATE runs SET seen = ? WHERE id = ?"
_ENDED = "UPDATE runs SET status = ?, wall_seconds = ?, cpu_seconds = ?, peak_rss = ? WHERE id = ?"


@dataclass
class _Rows:
    """What the next transaction writes."""

    tasks: list[tuple[Any, ...]] = field(default_factory=list)
    attempts: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    values: list[tuple[Any, ...]] = field(default_factory=list)
    undone: list[tuple[Any, ...]] = field(default_factory=list)
    forgotten: list[tuple[Any, ...]] = field(default_factory=list)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write them, in order."""
        self.values.sort()  # neighbours in the file are written one after the other
        for table in ("tasks", "attempts", "events", "values"):
            insert_all(connection, table, getattr(self, table))
        connection.executemany(_UNDONE, self.undone)
        connection.executemany(_FORGET, self.forgotten)


class Recording:
    """Keeps one run, as `forgepar.keeping.Keeper` says.

    Args:
        path: the store's file.
        plan: the workflow.
        policy: the run's rules.
        resume: how to take up what earlier runs did; None: not at all.

    Attributes:
        look_at: when to call `beat` at the latest.

    Raises:
        StoreError: the store cannot be used.
        UnknownTask: tasks to run again that are not there.
    """

    def __init__(self, path: Path, plan: Plan, policy: RunPolicy, resume: Resume | None) -> None:
        self.look_at = math.inf
        self._path = path
        self._plan = plan
        self._policy = policy
        self._resume = resume
        self._fingerprints = Fingerprints(plan, policy.seed)
        forced = None if resume is None else resume.forced(plan)
        self._connection = open_to_write(path)
        self._life = ""
        self._owner, self._is_foreign = os.getpid(), False
        self._file = path.resolve()
        self._was: os.stat_result | None = self._file.stat()
        self._files = ValueFiles(files_of(path))
        self._writer = FileWriter(self._files)
        self._lock = RunLock(files_of(path), plan.workflow_name, self._fingerprints.of_task)
        _live.add(self)
        try:
            if resume is not None:
                self._lock.acquire(wait=resume.wait)
            else:
                self._lock.try_acquire()
            self._priors = Priors(self._connection, self._files, path)
            self._restored: IntArray = np.zeros(0, np.int32)
            if forced is not None:
                with telling(path):
                    kept = np.flatnonzero(kept_tasks(plan, policy)).astype(np.int32)
                    tasks = range(plan.n_tasks)
                    self._restored = self._priors.find(plan, self._fingerprints.of_task, tasks, ~forced, kept)
        except BaseException:
            self.close()
            raise
        self._tainted = np.zeros(plan.n_tasks, np.bool_)
        self._forgotten: set[int] = set()
        self._reasons_told: set[str] = set()
        self._pending: list[tuple[Tasks, Sequence[Wire]]] = []
        self._entries: list[tuple[int, Any]] = []
        self._rows = _Rows()
        self._has_grown = False
        self._run = 0
        self._is_ended = self._has_failed = self._ends_layer = False
        self._flushed_at = self._synced_at = -math.inf
        self._flush_seconds = 0.0

    @property
    def all_done(self) -> bool:
        """Whether no task need run."""
        return len(self._restored) == self._plan.n_tasks

    def not_stored(self) -> Mapping[str, str]:
        """Return why the values of tasks are not kept, by name."""
        return {self._plan.name(task): reason for task, reason in self._fingerprints.reasons.items()}

    def warn_of_not_stored(self) -> None:
        """Warn of tasks whose value cannot be kept, though nobody said that it should not be."""
        for text in self._told_not_stored(self._fingerprints.reasons):
            warnings.warn(text, StoreWarning, stacklevel=5)

    def _told_not_stored(self, tasks: Iterable[int]) -> Iterator[str]:
        """Yield what is to be told of some tasks that have no fingerprint, a reason each that was not told before."""
        by_reason: dict[str, list[int]] = {}
        n_following = 0
        for task in tasks:
            reason = self._fingerprints.reasons[task]
            if task in self._fingerprints.declared or reason in self._reasons_told:
                continue
            if reason.startswith("it follows "):
                n_following += 1
            else:
                by_reason.setdefault(reason, []).append(task)
        for reason, alike in by_reason.items():
            self._reasons_told.add(reason)
            names = ", ".join(repr(self._plan.name(task)) for task in alike[:_MOST_NAMED])
            more = f" and {len(alike) - _MOST_NAMED} more" if len(alike) > _MOST_NAMED else ""
            follow = f", nor of the {n_following} that follow such" if n_following else ""
            yield (
                f"the run store keeps no value of {names}{more}{follow}: {reason}. They run again in a resumed run; "
                "give them version= or arguments that can be compared, or cache=False to say that this is meant."
            )

    # The keeper's part

    def begin(self, ledger: Ledger, arena: Arena) -> IntArray:
        """Write down that the run begins; return the tasks that need not run."""
        self._ledger, self._arena = ledger, arena
        plan = self._plan
        row = (
            ledger.run_id,
            plain_text(plan.workflow_name),
            ledger.began_at,
            ledger.began_at,
            plan.n_tasks,
            plan.n_layers,
            ledger.n_slots,
            self._policy.schedule,
            self._resume is not None,
            socket.gethostname(),
            os.getpid(),
            start_time(os.getpid()),
            python_version(),
            __version__,
            *_columns(plan),
        )
        self._life = life_file(self._files.folder, ledger.run_id)
        with telling(self._path):
            hold(self._life)
            try:
                self._run = self._connection.execute(_RUN, row).lastrowid or 0
            except BaseException:  # an interrupt, once the row is there
                with suppress(sqlite3.Error):
                    self._connection.execute("DELETE FROM runs WHERE run_id = ?", (ledger.run_id,))
                raise
            self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000:.0f}")
        self._flushed_at = self._synced_at = time.perf_counter()
        if len(self._restored):
            self._flushed_at -= _FLUSH_SECONDS  # at once: whoever clears the store sees what is in use
        return self._restored

    def grow(self, plan: Plan) -> IntArray:
        """Go on with a plan that has more tasks."""
        self._collect()
        n = self._plan.n_tasks
        self._plan = plan
        self._fingerprints.grow(plan)
        self._tainted = np.append(self._tainted, np.zeros(plan.n_tasks - n, np.bool_))
        parents = [task for task, last in plan.alias.items() if last >= n]
        if self._tainted[parents].any():
            self._tainted[n:] = True
        self._has_grown = True
        new = range(n, plan.n_tasks)
        for text in self._told_not_stored(task for task in new if task in self._fingerprints.reasons):
            report(text, StoreWarning)
        if self._resume is None:
            return np.zeros(0, np.int32)
        may = ~(self._tainted | self._resume.forced(plan))
        try:
            with telling(self._path):
                found = self._priors.find(plan, self._fingerprints.of_task, new, may, np.array(new, np.int32))
        except StoreError as error:
            report(f"{error} The {len(new)} tasks that joined the run run whatever earlier runs did.", StoreWarning)
            return np.zeros(0, np.int32)
        self._restored = np.append(self._restored, found)
        return found

    def taken_over(self) -> IntArray:
        """Return the tasks that a run did which never completed."""
        try:
            with telling(self._path):
                return np.array(self._priors.unfinished(self._restored.tolist()), np.int32)
        except StoreError as error:
            report(f"{error} What earlier runs did is not undone.", StoreWarning)
            return np.zeros(0, np.int32)

    def load(self, task: int) -> Wire:
        """Return the value of a task that an earlier run did."""
        with telling(self._path):
            return self._priors.load(task, self._arena)

    def values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Take in what tasks returned; large values are mapped, so that they outlive their segment."""
        self._check_owner()
        self._pending.append((tasks, values))
        if tuple not in set(map(type, values)):
            return
        for task, value in zip(tasks, values, strict=False):
            if type(value) is tuple and type(value[0]) is str and self._is_kept(int(task)):
                self._writer.put(int(task), self._arena.read(value))

    def take(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Take in what was noted."""
        self._check_owner()
        for numbered in entries:
            entry = numbered[1]
            if isinstance(entry, Event):
                # At once: what the ledger says of a task that failed changes with its next attempt.
                self._rows.events.append((self._run, entry.seq, line_of(entry)))
                self._collect_event(entry)
            else:
                self._entries.append(numbered)
        self.look_at = self._flushed_at + max(_FLUSH_SECONDS, _MOST_SHARE * self._flush_seconds)
        self.look_at = max(self._flushed_at, min(self.look_at, self._flushed_at + _SYNC_SECONDS))

    def beat(self, now: float) -> None:
        """Write what waits, if it is time for that."""
        self._check_owner()
        if now >= self.look_at:
            self._flush(now)

    # Ending

    def finish(self, status: Literal["completed", "failed", "cancelled", "interrupted"]) -> None:
        """Write all that waits, and how the run ended; if that is interrupted, it is to be called again.

        In a forked child of the process that keeps the run it does nothing, as `close`.
        """
        if self._is_foreign:
            return
        if self._run and not self._is_ended:
            self._writer.close()
            with suppress(sqlite3.Error):
                self._connection.execute(f"PRAGMA busy_timeout = {PATIENCE_SECONDS * 1000:.0f}")
            self._collect()
            ledger = self._ledger
            wall = ledger.wall_seconds or time.perf_counter() - ledger.began
            self._commit(is_synced=True, end=(status, wall, ledger.cpu_seconds, ledger.peak_rss, self._run))
            self._is_ended = True
        self.close()

    def close(self) -> None:
        """Let go of all, first of what others wait for."""
        if self._is_foreign:
            return
        _live.discard(self)
        try:
            with suppress(sqlite3.Error):
                self._connection.close()
        finally:
            try:
                self._lock.release()
                if is_own(self._life):
                    with suppress(OSError):
                        os.unlink(self._life)  # noqa: PTH108
                    let_go(self._life)
            finally:
                self._writer.close()

    def leave_to_parent(self) -> None:
        """In a forked child, touch nothing of the store.

        The connection is never closed there: that would take back, in memory that it shares with the parent, what the
        parent is about to write.
        """
        self._is_foreign = True
        keep_for_ever(self._connection)

    def _check_owner(self) -> None:
        if self._is_foreign:  # a callback of the run has forked this process
            raise WrongProcess.here(self._owner)

    # Writing

    def _flush(self, now: float) -> None:
        self._collect()
        is_synced = self._ends_layer or now - self._synced_at >= _SYNC_SECONDS
        is_done = self._commit(is_synced=is_synced)
        self._flushed_at = time.perf_counter()
        self._flush_seconds = self._flushed_at - now
        if not is_done:
            self.look_at = self._flushed_at + _RETRY_SECONDS
            return
        if is_synced:
            self._synced_at = self._flushed_at
            self._ends_layer = False
        self.look_at = math.inf if is_synced else self._synced_at + _SYNC_SECONDS
        if self._writer.is_busy:
            self.look_at = min(self.look_at, self._flushed_at + _FLUSH_SECONDS)

    def _commit(self, *, is_synced: bool, end: tuple[Any, ...] | None = None) -> bool:
        """Write the rows in one transaction; tell whether they are in."""
        execute = self._connection.execute
        try:
            execute(f"PRAGMA synchronous = {'FULL' if is_synced else 'NORMAL'}")
            try:
                execute("BEGIN IMMEDIATE")
                self._rows.write(self._connection)
                execute(_SEEN, (time.time(), self._run))  # without a change nothing would be synced
                if end is not None:
                    execute(_ENDED, end)
                if self._has_grown:
                    plan = self._plan
                    execute(_GROWN, (plan.n_tasks, plan.n_layers, *_columns(plan), self._run))
                execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if not self._has_failed or end is not None:
                ending = "it goes on, and this is tried again" if end is None else "what it did since is not kept"
                report(f"{as_store_error(error, self._path)} Run {self._ledger.run_id}: {ending}.", StoreWarning)
            self._has_failed = True
            return False
        self._rows = _Rows()
        self._has_failed = self._has_grown = False
        if is_synced and self._was is not None and not _is_there(self._file, self._was):
            self._was = None  # it is told once
            report(
                f"the run store {str(self._path)!r} was removed or replaced while run {self._ledger.run_id} goes: "
                "nothing of this run is kept.",
                StoreWarning,
            )
        return True

    # From entries to rows

    def _collect(self) -> None:
        """Make rows of what was told."""
        entries, self._entries = self._entries, []
        for seq, entry in entries:
            if isinstance(entry, NotRun):
                self._collect_not_run(entry, seq)
            else:
                self._collect_completed(entry, seq)
        pending, self._pending = self._pending, []
        for tasks, values in pending:
            self._collect_values(tasks, values)
        for written in self._writer.done():
            fingerprint = self._fingerprints.of_task[written.key]
            if written.error is not None:
                name = self._plan.name(written.key)
                why = getattr(written.error, "strerror", None) or f"{type(written.error).__name__}: {written.error}"
                report(f"the value of task {name!r} is not kept in {str(self._path)!r}: {why}.", StoreWarning)
            elif fingerprint is not None and not self._tainted[written.key]:
                payload = payload_of_file(written.name, written.lengths)
                checksum = checksum_of(fingerprint, FILE, payload)
                self._rows.values.append((fingerprint, self._run, FILE, checksum, payload))

    def _collect_values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        run, of_task, tainted, rows = self._run, self._fingerprints.of_task, self._tainted, self._rows.values
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
                continue  # the writer has it
            rows.append((fingerprint, run, kind, checksum_of(fingerprint, kind, payload), payload))

    def _collect_completed(self, tasks: Tasks, seq: int | None) -> None:
        """Make rows of tasks that completed; ``seq`` is the number of the first event, None: events tell of it."""
        ledger, rows = self._ledger, as_index(tasks)
        run, of_task, began, attempts = self._run, self._fingerprints.of_task, ledger.began, ledger.attempts
        columns = (ledger.start[rows] - began, ledger.duration[rows], ledger.worker[rows], ledger.bytes[rows])
        tainted = self._tainted if self._tainted.any() else None
        status, add = int(Status.COMPLETED), self._rows.tasks.append
        numbers = tasks if isinstance(tasks, range) else tasks.tolist()
        for task, start, seconds, worker, n_bytes in zip(
            numbers, *(column.tolist() for column in columns), strict=True
        ):
            fingerprint = of_task[task] if tainted is None or not tainted[task] else None
            attempt = attempts.get(task, 1) if attempts else 1
            add((run, task, status, fingerprint, None, seq, attempt, start, seconds, worker, n_bytes, None))
            if seq is not None:
                seq += 2

    def _collect_not_run(self, entry: NotRun, seq: int) -> None:
        of_task, at = self._fingerprints.of_task, entry.at - self._ledger.began_at
        is_cached = entry.cause == EARLIER_RUN
        status = int(Status.CACHED if is_cached else Status.SKIPPED)
        for number, task in enumerate(entry.tasks.tolist(), seq):
            fingerprint, source = (of_task[task], self._priors.source(task)) if is_cached else (None, entry.cause)
            self._rows.tasks.append((self._run, task, status, fingerprint, source, number, 0, at, None, None, 0, None))

    def _collect_event(self, event: Event) -> None:
        """Make rows of what an event tells of a task."""
        find = self._plan.find
        match event:
            case WorkflowTaskParallelCompleted():
                self._ends_layer = True
            case WorkflowTaskCompleted():
                task = find(event.task)
                self._collect_completed(range(task, task + 1), None)
            case WorkflowTaskSkipped():
                self._collect_left_out(find(event.task))
            case WorkflowTaskRetried():
                self._collect_failure(event.task, event.attempt - 1, event.error)
            case WorkflowToolFallback():
                self._collect_failure(event.task, event.attempt, event.error)
                if event.kind != "retry":
                    self._taint(find(event.task))
            case WorkflowTaskFailed():
                self._collect_failure(event.task, event.attempt, event.error, is_final=True)
            case WorkflowTaskRolledBack(error=None):
                task = find(event.task)
                self._rows.undone.append((int(Status.COMPENSATED), self._run, task))
                self._forget(task)

    def _taint(self, task: int) -> None:
        """Note that a task, and what follows it, will be made from something else than its fingerprint says.

        What follows one that was tainted is so already: all calls together cost as much as one look at all tasks.
        """
        tainted, graph, left = self._tainted, self._plan.graph, [task]
        while left:
            one = left.pop()
            if not tainted[one]:
                tainted[one] = True
                left += graph.successors(one).tolist()

    def _forget(self, task: int) -> None:
        """Have the store forget the value of a task that was undone, and what was made from it or built on it."""
        left = [task]
        while left:
            one = left.pop()
            if one not in self._forgotten:
                self._forgotten.add(one)
                self._tainted[one] = True  # its file may not be written yet
                self._rows.forgotten.append((self._fingerprints.of_task[one],))
                left += self._plan.graph.successors(one).tolist()

    def _collect_left_out(self, task: int) -> None:
        """Make a row of a task that failed and is skipped for it."""
        told = (
            int(Status.SKIPPED),
            None,
            None,
            None,
            self._ledger.attempts.get(task, 1),
            *self._last_of(task),
            0,
            None,
        )
        self._rows.tasks.append((self._run, task, *told))

    def _last_of(self, task: int) -> tuple[float | None, float | None, int]:
        """Return when the last attempt of a task began, how long it took and where it ran."""
        ledger = self._ledger
        return _finite(ledger.start[task] - ledger.began), _finite(ledger.duration[task]), int(ledger.worker[task])

    def _collect_failure(self, name: str, attempt: int, error: str, *, is_final: bool = False) -> None:
        task = self._plan.find(name)
        at, error, found = self._last_of(task), plain_text(error), self._ledger.errors.get(task)
        trace = "" if found is None or not is_final else plain_text("".join(traceback.format_exception(found)))
        self._rows.attempts.append((self._run, task, attempt, *at, error, trace))
        if is_final:
            told = (int(Status.FAILED), None, None, None, attempt, *at, 0, error)
            self._rows.tasks.append((self._run, task, *told))

    def _is_kept(self, task: int) -> bool:
        return self._fingerprints.of_task[task] is not None and not self._tainted[task]


@contextmanager
def recording(
    path: str | os.PathLike[str] | None, plan: Plan, policy: RunPolicy, resume: Resume | None
) -> Iterator[Recording | None]:
    """Have a run kept in a store; nothing is done where there is none."""
    if path is None:
        yield None
        return
    keeper = Recording(check_path("store", path), plan, policy, resume)
    try:
        keeper.warn_of_not_stored()
        yield keeper
    finally:
        try:
            keeper.finish("interrupted")  # unless it was told how the run ended
        finally:
            keeper.close()


def _columns(plan: Plan) -> tuple[bytes, ...]:
    """Return what the row of a run tells of its tasks: what they call and are called, and what depends on what."""
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


def _is_there(path: Path, was: os.stat_result) -> bool:
    """Tell whether a file is still the one that it was."""
    try:
        return os.path.samestat(path.stat(), was)
    except OSError:
        return False


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


_live: weakref.WeakSet[Recording] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for keeper in list(_live):
        keeper.leave_to_parent()
    _live.clear()


in_child(_leave_all_to_parent)
