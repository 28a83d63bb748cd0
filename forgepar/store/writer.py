"""Writing a run to a store while it runs: the `forgepar.records.keeper.Keeper` of a run.

    values  ──> pending, mapped ──> FileWriter (large values)
    take    ──> entries ──┐
                          └──> RunRows ──> one transaction, at most every 0.2 s ──> synced when a layer ends

Work is done per batch where possible, not per task, and rows are made when the run waits for its workers. The rows of
a transaction that fails stay in memory until a later one succeeds.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import sys
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forgepar._validate import check_path
from forgepar.errors import StoreError, StoreWarning, WrongProcess, report
from forgepar.machine import start_time
from forgepar.records.events import Event
from forgepar.records.keeper import Entry, TasksNotRun
from forgepar.records.ledger import Ledger
from forgepar.scheduling.run_state import RunPolicy, kept_tasks
from forgepar.store.blobs import FileWriter, ValueFiles
from forgepar.store.columns import plain_text
from forgepar.store.database import PATIENCE_SECONDS, as_store_error, files_of, open_to_write, store_errors
from forgepar.store.fingerprint.tasks import Fingerprints
from forgepar.store.lock import RunLock, life_file
from forgepar.store.resume import CachedResults, Resume
from forgepar.store.rows import PendingRows, RunRows, plan_columns
from forgepar.system.forking import in_child, never_finalize
from forgepar.system.life_locks import hold, is_own, release
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.version import __version__
from forgepar.workflow.plan import IntArray, Plan, Tasks

_FLUSH_SECONDS = 0.2  # least time between two transactions: a kill loses the results of that time
_SYNC_SECONDS = 1.0  # most time between two synced transactions: a power cut loses the results of that time
_MOST_SHARE = 20  # transactions take at most a twentieth of the time
_RETRY_SECONDS = 1.0  # until a failed transaction is tried again
_BUSY_SECONDS = 0.05  # how long a transaction waits for another program during the run
_MOST_NAMED = 3  # tasks named in a warning

_INSERT_RUN = (
    "INSERT INTO runs(run_id, workflow, status, began, seen, n_tasks, n_layers, workers, schedule, resumed, host, pid, "
    "pid_started, python, forgepar, callables, callable_of, bases, base_of, ordinals, given_names, edges) "
    "VALUES (?,?,'running',?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_UPDATE_PLAN = (
    "UPDATE runs SET n_tasks = ?, n_layers = ?, callables = ?, callable_of = ?, bases = ?, base_of = ?, "
    "ordinals = ?, given_names = ?, edges = ? WHERE id = ?"
)
_UPDATE_SEEN = "UPDATE runs SET seen = ? WHERE id = ?"
_UPDATE_END = "UPDATE runs SET status = ?, wall_seconds = ?, cpu_seconds = ?, peak_rss = ? WHERE id = ?"


class StoreWriter:
    """Writes one run to a store; see `forgepar.records.keeper.Keeper` for the methods that the run calls.

    Args:
        path: the store's file.
        plan: the workflow.
        policy: the run's rules.
        resume: how to use the values of earlier runs; None: do not use them.

    Attributes:
        look_at: when to call `beat` at the latest.

    Raises:
        StoreError: the store cannot be used.
        UnknownTask: ``resume`` names tasks that do not exist.
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
        self._status: os.stat_result | None = self._file.stat()  # None once it was reported that it changed
        self._files = ValueFiles(files_of(path))
        self._writer = FileWriter(self._files)
        self._lock = RunLock(files_of(path), plan.workflow_name, self._fingerprints.of_task)
        _live.add(self)
        try:
            if resume is not None:
                self._lock.acquire(wait=resume.wait)
            else:
                self._lock.try_acquire()
            self._cached = CachedResults(self._connection, self._files, path)
            self._restored: IntArray = np.zeros(0, np.int32)
            if forced is not None:
                with store_errors(path):
                    kept = np.flatnonzero(kept_tasks(plan, policy)).astype(np.int32)
                    tasks = range(plan.n_tasks)
                    self._restored = self._cached.find(plan, self._fingerprints.of_task, tasks, ~forced, kept)
        except BaseException:
            self.close()
            raise
        self._rows = RunRows(plan, self._fingerprints, self._cached)
        self._reasons_given: set[str] = set()
        self._pending: list[tuple[Tasks, Sequence[Wire]]] = []
        self._entries: list[tuple[int, Any]] = []
        self._has_grown = False
        self._run = 0
        self._is_ended = self._has_failed = False
        self._flushed_at = self._synced_at = -math.inf
        self._flush_seconds = 0.0

    @property
    def all_done(self) -> bool:
        """Whether every task has a value of an earlier run."""
        return len(self._restored) == self._plan.n_tasks

    def not_stored(self) -> Mapping[str, str]:
        """Return why values are not stored, by the names of their tasks."""
        return {self._plan.name(task): reason for task, reason in self._fingerprints.reasons.items()}

    def warn_of_not_stored(self) -> None:
        """Warn of tasks whose values cannot be stored, unless they were declared so."""
        for text in self._warnings_of(self._fingerprints.reasons):
            warnings.warn(text, StoreWarning, stacklevel=5)

    def _warnings_of(self, tasks: Iterable[int]) -> Iterator[str]:
        """Yield a warning for each reason why tasks have no fingerprint; each reason is given once per run."""
        by_reason: dict[str, list[int]] = {}
        n_following = 0
        for task in tasks:
            reason = self._fingerprints.reasons[task]
            if task in self._fingerprints.declared or reason in self._reasons_given:
                continue
            if reason.startswith("it follows "):
                n_following += 1
            else:
                by_reason.setdefault(reason, []).append(task)
        for reason, alike in by_reason.items():
            self._reasons_given.add(reason)
            names = ", ".join(repr(self._plan.name(task)) for task in alike[:_MOST_NAMED])
            more = f" and {len(alike) - _MOST_NAMED} more" if len(alike) > _MOST_NAMED else ""
            follow = f", or of the {n_following} that follow such tasks" if n_following else ""
            yield (
                f"the run store does not keep the value of {names}{more}{follow}: {reason}. They run again in a "
                "resumed run. Give them version= or arguments that can be compared, or cache=False if this is intended."
            )

    # The methods of a Keeper

    def begin(self, ledger: Ledger, arena: Arena) -> IntArray:
        """Insert the run; return the tasks that have values of earlier runs."""
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
            "{}.{}.{}".format(*sys.version_info),
            __version__,
            *plan_columns(plan),
        )
        self._life = life_file(self._files.folder, ledger.run_id)
        with store_errors(self._path):
            hold(self._life)
            try:
                self._run = self._connection.execute(_INSERT_RUN, row).lastrowid or 0
            except BaseException:  # an interrupt after the row was inserted
                with suppress(sqlite3.Error):
                    self._connection.execute("DELETE FROM runs WHERE run_id = ?", (ledger.run_id,))
                raise
            self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000:.0f}")
        self._rows.begin(self._run, ledger)
        self._flushed_at = self._synced_at = time.perf_counter()
        if len(self._restored):
            self._flushed_at -= _FLUSH_SECONDS  # write at once, so that garbage collection sees which values are in use
        return self._restored

    def grow(self, plan: Plan) -> IntArray:
        """Continue with a plan that has more tasks; return the new tasks that have values of earlier runs."""
        self._collect()
        n = self._plan.n_tasks
        self._plan = plan
        self._fingerprints.grow(plan)
        self._rows.grow(plan)
        self._has_grown = True
        new = range(n, plan.n_tasks)
        for text in self._warnings_of(task for task in new if task in self._fingerprints.reasons):
            report(text, StoreWarning)
        if self._resume is None:
            return np.zeros(0, np.int32)
        may = ~(self._rows.tainted | self._resume.forced(plan))
        try:
            with store_errors(self._path):
                found = self._cached.find(plan, self._fingerprints.of_task, new, may, np.array(new, np.int32))
        except StoreError as error:
            report(
                f"{error} The {len(new)} tasks that joined the run run without values of earlier runs.", StoreWarning
            )
            return np.zeros(0, np.int32)
        self._restored = np.append(self._restored, found)
        return found

    def taken_over(self) -> IntArray:
        """Return the restored tasks whose values no completed run has made or used."""
        try:
            with store_errors(self._path):
                return np.array(self._cached.unfinished(self._restored.tolist()), np.int32)
        except StoreError as error:
            report(f"{error} The effects of earlier runs are not undone.", StoreWarning)
            return np.zeros(0, np.int32)

    def load(self, task: int) -> Wire:
        """Return the value of a restored task."""
        with store_errors(self._path):
            return self._cached.load(task, self._arena)

    def values(self, tasks: Tasks, values: Sequence[Wire]) -> None:
        """Add the values that tasks returned; large values are mapped, so that they outlive their segments."""
        self._check_owner()
        self._pending.append((tasks, values))
        if tuple not in set(map(type, values)):
            return
        for task, value in zip(tasks, values, strict=False):
            if type(value) is tuple and type(value[0]) is str and self._rows.is_stored(int(task)):
                self._writer.put(int(task), self._arena.read(value))

    def take(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Add what the run recorded."""
        self._check_owner()
        for numbered in entries:
            entry = numbered[1]
            if isinstance(entry, Event):
                self._rows.add_event(entry)  # at once: the next attempt overwrites the ledger's columns of this one
            else:
                self._entries.append(numbered)
        self.look_at = self._flushed_at + max(_FLUSH_SECONDS, _MOST_SHARE * self._flush_seconds)
        self.look_at = max(self._flushed_at, min(self.look_at, self._flushed_at + _SYNC_SECONDS))

    def beat(self, now: float) -> None:
        """Write pending rows, if it is time to."""
        self._check_owner()
        if now >= self.look_at:
            self._flush(now)

    # Ending

    def finish(self, status: Literal["completed", "failed", "cancelled", "interrupted"]) -> None:
        """Write all pending rows and the status of the run, and close the store.

        If an interrupt ends this call, call it again. In a forked child it does nothing, like `close`.
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
        """Close the connection, release the locks, and end the threads: first what other programs wait for."""
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
                    release(self._life)
            finally:
                self._writer.close()

    def leave_to_parent(self) -> None:
        """In a forked child, stop using the store.

        The child never closes the connection: that would roll back, in memory shared with the parent, the transaction
        that the parent is writing.
        """
        self._is_foreign = True
        never_finalize(self._connection)

    def _check_owner(self) -> None:
        if self._is_foreign:  # a callback of the run has forked this process
            raise WrongProcess.here(self._owner)

    # Writing

    def _flush(self, now: float) -> None:
        self._collect()
        is_synced = self._rows.ends_layer or now - self._synced_at >= _SYNC_SECONDS
        is_done = self._commit(is_synced=is_synced)
        self._flushed_at = time.perf_counter()
        self._flush_seconds = self._flushed_at - now
        if not is_done:
            self.look_at = self._flushed_at + _RETRY_SECONDS
            return
        if is_synced:
            self._synced_at = self._flushed_at
            self._rows.ends_layer = False
        self.look_at = math.inf if is_synced else self._synced_at + _SYNC_SECONDS
        if self._writer.is_busy:
            self.look_at = min(self.look_at, self._flushed_at + _FLUSH_SECONDS)

    def _collect(self) -> None:
        """Make rows of all entries and values."""
        entries, self._entries = self._entries, []
        for seq, entry in entries:
            if isinstance(entry, TasksNotRun):
                self._rows.add_not_run(entry, seq)
            else:
                self._rows.add_completed(entry, seq)
        pending, self._pending = self._pending, []
        for tasks, values in pending:
            self._rows.add_values(tasks, values)
        for written in self._writer.done():
            if written.error is None:
                self._rows.add_file(written)
            else:
                name = self._plan.name(written.key)
                why = getattr(written.error, "strerror", None) or f"{type(written.error).__name__}: {written.error}"
                report(f"the value of task {name!r} is not kept in {str(self._path)!r}: {why}.", StoreWarning)

    def _commit(self, *, is_synced: bool, end: tuple[Any, ...] | None = None) -> bool:
        """Write the pending rows in one transaction; return whether it succeeded."""
        execute = self._connection.execute
        try:
            execute(f"PRAGMA synchronous = {'FULL' if is_synced else 'NORMAL'}")
            try:
                execute("BEGIN IMMEDIATE")
                self._rows.pending.write(self._connection)
                execute(_UPDATE_SEEN, (time.time(), self._run))  # without a change, SQLite would sync nothing
                if end is not None:
                    execute(_UPDATE_END, end)
                if self._has_grown:
                    plan = self._plan
                    execute(_UPDATE_PLAN, (plan.n_tasks, plan.n_layers, *plan_columns(plan), self._run))
                execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if not self._has_failed or end is not None:
                effect = (
                    "continues, and will try again to write its results"
                    if end is None
                    else "does not keep the results since the last transaction"
                )
                report(f"{as_store_error(error, self._path)} Run {self._ledger.run_id} {effect}.", StoreWarning)
            self._has_failed = True
            return False
        self._rows.pending = PendingRows()
        self._has_failed = self._has_grown = False
        if is_synced and self._status is not None and not _is_same(self._file, self._status):
            self._status = None
            report(
                f"the run store {str(self._path)!r} was removed or replaced during run {self._ledger.run_id}: "
                "nothing of this run is kept.",
                StoreWarning,
            )
        return True


@contextmanager
def store_writer(
    path: str | os.PathLike[str] | None, plan: Plan, policy: RunPolicy, resume: Resume | None
) -> Iterator[StoreWriter | None]:
    """Yield the writer of a run; None if ``path`` is None."""
    if path is None:
        yield None
        return
    keeper = StoreWriter(check_path("store", path), plan, policy, resume)
    try:
        keeper.warn_of_not_stored()
        yield keeper
    finally:
        try:
            keeper.finish("interrupted")  # no effect if the run has finished it
        finally:
            keeper.close()


def _is_same(path: Path, status: os.stat_result) -> bool:
    """Return whether a path is still the file that had this status."""
    try:
        return os.path.samestat(path.stat(), status)
    except OSError:
        return False


_live: weakref.WeakSet[StoreWriter] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for keeper in list(_live):
        keeper.leave_to_parent()
    _live.clear()


in_child(_leave_all_to_parent)
