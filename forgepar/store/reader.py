"""Reading a run store: `Store` and its runs, also while a run writes to the store.

    Store.open ──> runs ──> RunFacts
               ──> run  ──> StoredRun ──> facts, table, events, values

Only `StoredRun.value` unpickles anything.
"""

from __future__ import annotations

import math
import os
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from forgepar._validate import check_instance, check_path, is_count, shown
from forgepar.errors import MissingResult, StoreError, UnknownTask, WrongProcess, is_system_error, text_of
from forgepar.records.audit_log import event_of
from forgepar.records.events import Event
from forgepar.records.table import FailedAttempt, RunTable
from forgepar.scheduling.run_state import Status
from forgepar.store.blobs import ValueFiles
from forgepar.store.columns import INTEGER, NONE, NUMBER, TEXT, check_columns
from forgepar.store.database import files_of, open_to_read, read_errors, store_errors
from forgepar.store.resume import FILE, is_whole, name_and_lengths, value_of
from forgepar.store.run_facts import SELECT_FACTS, RunFacts, facts_of_run, facts_of_runs
from forgepar.store.stored_plan import (
    SELECT_PLAN,
    SELECT_TASKS,
    StoredColumns,
    StoredPlan,
    events_of_tasks,
    stored_plan,
)
from forgepar.system.forking import in_child, never_finalize
from forgepar.version import public

_MOST_DIGITS = 20  # of a run's number; SQLite counts to 2**63
_ATTEMPT_TYPES = (INTEGER, INTEGER, NUMBER + NONE, NUMBER + NONE, INTEGER + NONE, TEXT, TEXT)
_VALUE_TYPES: tuple[tuple[type, ...], ...] = (INTEGER, INTEGER, INTEGER, (bytes, type(None)))
_SELECT_ATTEMPTS = (
    "SELECT task, attempt, start, seconds, worker, error, traceback FROM attempts WHERE run = ? ORDER BY 1, 2"
)
_SELECT_VALUES = (  # without the payload of values that are in the database, which may be large
    f'SELECT task, "values".run, length(payload), CASE kind WHEN {FILE} THEN payload END '  # noqa: S608
    'FROM tasks JOIN "values" USING (fingerprint) WHERE tasks.run = ? '
    'AND "values".run = coalesce(source, tasks.run) ORDER BY task'
)
_SELECT_VALUE = (
    'SELECT fingerprint, kind, checksum, payload FROM tasks JOIN "values" USING (fingerprint) '
    'WHERE tasks.run = ? AND task = ? ORDER BY "values".run = coalesce(source, tasks.run) DESC'
)


@public
class StoredValue(NamedTuple):
    """The value of a task in a store.

    Attributes:
        name: the task's name.
        n_bytes: size as stored, bytes.
        made_by: number of the run that computed it.
    """

    name: str
    n_bytes: int
    made_by: int


@public
class Store:
    """A run store, open for reading; a run may write to it at the same time.

    Args:
        path: the file.
        connection: to the file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from forgepar import Workflow
        >>> wf = Workflow("small")
        >>> _ = wf.map(abs, [-1, 2])
        >>> with TemporaryDirectory() as folder:
        ...     _ = wf.run(backend="inline", store=f"{folder}/runs.db")
        ...     with Store.open(f"{folder}/runs.db") as store:
        ...         [(run.number, run.workflow, run.status) for run in store.runs()], store.run().value("abs-0")
        ([(1, 'small', 'completed')], 1)
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._owner, self._opened = os.getpid(), connection
        _open.add(self)
        self._files = ValueFiles(files_of(path))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store for reading.

        Args:
            path: the file.

        Returns:
            The store; close it, or use it in a ``with`` statement.

        Raises:
            StoreError: there is no such file, it cannot be read, or it was written by a newer version.
            StoreUntrusted: another user may write to it.
        """
        place = check_path("path", path)
        return cls(place, open_to_read(place))

    def close(self) -> None:
        """Close the store. In a forked child this does nothing: the connection is the parent's."""
        if self._owner == os.getpid():
            self._opened.close()

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._owner != os.getpid():  # two processes must not use one SQLite connection
            raise WrongProcess(
                f"This store was opened by process {self._owner}, and this is process {os.getpid()}, which was forked "
                "from it. Open the store in this process.",
                owner=self._owner,
            )
        return self._opened

    def leave_to_parent(self) -> None:
        """In a forked child, keep the connection from being closed: it is the parent's."""
        never_finalize(self._opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def runs(self) -> list[RunFacts]:
        """Return the facts of all runs, in the order in which they began."""
        with read_errors(self.path):
            return facts_of_runs(self._connection, self._files.folder)

    def run(self, which: int | str | None = None) -> StoredRun:
        """Return one run.

        Args:
            which: its number, its id, or a unique prefix of its id; None or "last": the run that began last.

        Raises:
            StoreError: there is no such run, or several ids have this prefix.
        """
        if which is not None and not is_count(which) and not isinstance(which, str):
            raise StoreError(
                f"which must be the number of a run from 1, its id, or None for the last; got {shown(which)}.",
                path=str(self.path),
            )
        runs = self.runs()
        if which is None or which == "last":
            found = runs[-1:]
        elif not isinstance(which, str) or (which.isdecimal() and len(which) < _MOST_DIGITS):
            found = [run for run in runs if run.number == int(which) or run.run_id == which]
        else:
            found = [run for run in runs if run.run_id.startswith(which)]
        if len(found) != 1:
            what = "no run" if which is None or which == "last" else f"no run {shown(which)}"
            fault = f"{len(found)} runs with ids that begin with {shown(which)}" if found else what
            raise StoreError(
                f"the run store {str(self.path)!r} has {fault}. List its runs with forgepar runs {self.path}.",
                path=str(self.path),
            )
        return StoredRun(self, found[0].number)

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Run several queries on one state of the store."""
        try:
            self._rows("BEGIN")
            yield
        finally:
            if self._connection.in_transaction:
                self._rows("COMMIT")

    def _rows(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with store_errors(self.path):
            return self._connection.execute(statement, parameters).fetchall()


@public
class StoredRun:
    """One run of a store. Each call returns the current state of the store.

    Args:
        store: an open store.
        number: of the run.

    Attributes:
        number: of the run.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self.number = number
        self._known: StoredPlan | None = None

    @property
    def facts(self) -> RunFacts:
        """Facts of the run as a whole."""
        with read_errors(self._store.path):
            return facts_of_run(self._row(f"{SELECT_FACTS} WHERE id = ?"), self._store._files.folder)

    def table(self) -> RunTable:
        """Return the tasks of the run as columns; the status of tasks that have not run yet is PENDING."""
        with self._store._snapshot():
            facts, plan, rows, failures = self.facts, self._plan(), self._rows(SELECT_TASKS), self.failures()
        columns = StoredColumns(len(plan.names), Status.PENDING if facts.status == "running" else Status.CANCELLED)
        with read_errors(self._store.path):
            errors = columns.fill(rows)
        return RunTable(
            run_id=facts.run_id,
            workflow=facts.workflow,
            status=facts.status,
            schedule=facts.schedule,
            n_workers=facts.n_workers,
            began_at=facts.began_at,
            wall_seconds=facts.wall_seconds,
            cpu_seconds=facts.cpu_seconds,
            peak_rss=facts.peak_rss,
            names=plan.names,
            callables=plan.callables,
            callable_of=plan.callable_of,
            layer=plan.layer,
            status_of=columns.status,
            start=columns.start,
            seconds=columns.seconds,
            worker=columns.worker,
            attempt=columns.attempt,
            bytes=columns.bytes,
            sources=plan.sources,
            targets=plan.targets,
            failures=failures,
            errors=errors,
        )

    def failures(self) -> list[FailedAttempt]:
        """Return all attempts that failed, ordered by task and attempt."""
        found = self._rows(_SELECT_ATTEMPTS)
        with read_errors(self._store.path):
            check_columns(found, _ATTEMPT_TYPES)
        return [
            FailedAttempt(
                task, attempt, _or_nan(start), _or_nan(seconds), -1 if worker is None else worker, error, trace
            )
            for task, attempt, start, seconds, worker, error, trace in found
        ]

    def events(self) -> Iterator[Event]:
        """Yield the events of the run that are written so far, in order; those of tasks are made from their rows."""
        with self._store._snapshot():
            facts, plan = self.facts, self._plan()
            lines = self._rows("SELECT seq, line FROM events WHERE run = ?")
            rows = self._rows(SELECT_TASKS)
        with read_errors(self._store.path):
            numbered = [(seq, event_of(line.encode())) for seq, line in lines]
            numbered += events_of_tasks(rows, facts, plan)
            numbered.sort(key=lambda pair: pair[0])
        return (event for _, event in numbered)

    def stored_values(self) -> list[StoredValue]:
        """Return the values of the run's tasks that are in the store, without reading them."""
        with self._store._snapshot():
            names, rows = self._plan().names, self._rows(_SELECT_VALUES)
        found: dict[int, StoredValue] = {}
        with read_errors(self._store.path):
            check_columns(rows, _VALUE_TYPES)
            for task, maker, n_bytes, payload in rows:
                if payload is not None:
                    n_bytes = sum(name_and_lengths(payload)[1])
                found[task] = StoredValue(names[task], n_bytes, maker)
        return list(found.values())

    def value(self, name: str) -> Any:
        """Return the value of a task. It is unpickled, which runs code that the owner of the store wrote.

        Args:
            name: the task's name.

        Raises:
            UnknownTask: the run has no task of this name.
            MissingResult: the value is not stored.
            StoreError: the stored value is damaged, or cannot be unpickled here.
        """
        check_instance("name", name, str, "the name of a task")
        names = self._plan().names
        if name not in names:
            raise UnknownTask(
                f"run {self.number} has no task named {shown(name)}. List the tasks that have a value with "
                f"forgepar values {self._store.path} {self.number}."
            )
        rows = self._rows(_SELECT_VALUE, names.index(name))
        if not rows and (became := next((other for other in names if other.startswith(f"{name}/output")), None)):
            raise MissingResult(
                f"the store has no value of task {name!r} of run {self.number}, because it was replaced by other "
                f"tasks. Ask for the value of {became!r}."
            )
        if not rows:
            raise MissingResult(
                f"the store has no value of task {name!r} of run {self.number}: it did not complete, it cannot be "
                "compared with other runs (see RunResult.not_stored), or its value was removed (forgepar gc)."
            )
        for fingerprint, kind, checksum, payload in rows:
            if is_whole(fingerprint, kind, checksum, payload):
                return self._unpickle(name, kind, payload)
        raise StoreError(
            f"the value of task {name!r} in {str(self._store.path)!r} was altered. Run the workflow again with resume.",
            path=str(self._store.path),
        )

    def _unpickle(self, name: str, kind: int, payload: bytes) -> Any:
        try:
            return value_of(kind, payload, self._store._files)
        except StoreError:
            raise
        except Exception as error:
            cause = f"({type(error).__name__}: {text_of(error)})"
            if is_system_error(error):
                fault = f"could not be read {cause}."
            else:
                fault = (
                    f"cannot be unpickled here {cause}. Make the modules that it was created with importable, "
                    "for example with PYTHONPATH."
                )
            raise StoreError(f"the value of task {name!r} {fault}", path=str(self._store.path)) from error

    def _plan(self) -> StoredPlan:
        """Return the plan of the run, which changes only when tasks join the run."""
        (n_tasks,) = self._row("SELECT n_tasks FROM runs WHERE id = ?")
        if self._known is None or len(self._known.names) != n_tasks:
            with read_errors(self._store.path):
                self._known = stored_plan(self._row(SELECT_PLAN), n_tasks)
        return self._known

    def _row(self, statement: str) -> tuple[Any, ...]:
        """Return the one row of the run in table ``runs``."""
        rows = self._rows(statement)
        if not rows:
            raise StoreError(
                f"run {self.number} was removed from {str(self._store.path)!r} (forgepar gc) after it was looked up.",
                path=str(self._store.path),
            )
        return rows[0]

    def _rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._store._rows(statement, (self.number, *parameters))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


_open: weakref.WeakSet[Store] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for store in list(_open):
        store.leave_to_parent()
    _open.clear()


in_child(_leave_all_to_parent)
