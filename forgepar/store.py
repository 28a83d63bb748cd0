"""Asking a run store what its runs did: `Store`, also while a run writes to it.

    Store.open ──> runs ──> RunFacts
               ──> run  ──> StoredRun ──> facts, table, events, value

Nothing is unpickled but by `StoredRun.value`.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from forgepar.audit import event_of
from forgepar.errors import MissingResult, StoreError, UnknownTask, WrongProcess, is_system_error, text_of
from forgepar.events import (
    Event,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
)
from forgepar.forking import in_child, keep_for_ever
from forgepar.graph import Adjacency, longest_path_layers
from forgepar.lifelocks import NO_LOCK, is_held, kernel_of
from forgepar.machine import kernel_id, start_time
from forgepar.priors import is_whole, name_and_lengths, value_of
from forgepar.runlock import life_file
from forgepar.runstate import Status
from forgepar.runtable import FailedAttempt, RunTable
from forgepar.storefile import check_columns, files_of, open_to_read, reading, telling, unpack_integers, unpack_texts
from forgepar.validation import MOST_WORKERS, check_instance, check_path, is_count, shown
from forgepar.valuefiles import ValueFiles

_FACTS = (
    "id, run_id, workflow, status, began, wall_seconds, cpu_seconds, peak_rss, n_tasks, n_layers, workers, schedule, "
    "resumed, host, pid, pid_started, python, forgepar, "
    "seen"
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a store knows of a run as a whole.

    Attributes:
        number: of the run in the store, from 1.
        run_id: the run's own id.
        workflow: the workflow's name.
        status: "running", "completed", "failed", "cancelled" or "interrupted" (it was ended from outside, or killed).
        began_at: seconds since the epoch (UTC).
        wall_seconds: how long it took; of one that runs, how long it has.
        cpu_seconds: CPU time of its workers; 0 while it runs.
        peak_rss: largest resident memory of one, bytes; 0 while it runs.
        n_tasks: how many tasks the workflow has, as far as that is known.
        n_layers: how many layers.
        n_workers: how many workers the run had.
        schedule: "layers" or "eager".
        is_resumed: whether it took up what earlier runs did.
        host: name of the machine.
        pid: of the program.
        python: its version.
        forgepar: its version.
    """

    number: int
    run_id: str
    workflow: str
    status: str
    began_at: float
    wall_seconds: float
    cpu_seconds: float
    peak_rss: int
    n_tasks: int
    n_layers: int
    n_workers: int
    schedule: str
    is_resumed: bool
    host: str
    pid: int
    python: str
    forgepar: str


class StoredValue(NamedTuple):
    """What a store has of the value of a task.

    Attributes:
        name: the task's name.
        n_bytes: size of what is stored, bytes.
        made_by: number of the run that made it.
    """

    name: str
    n_bytes: int
    made_by: int


class Store:
    """A run store, open to be read; a run may write to it meanwhile.

    Args:
        path: the file.
        connection: to it.

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
        """Open a store to read it.

        Raises:
            StoreError: there is none, it cannot be read, or it was written by a newer version.
            StoreUntrusted: others may write to it.
        """
        place = check_path("path", path)
        return cls(place, open_to_read(place))

    def close(self) -> None:
        """Close it; in a forked child, leave it to the parent."""
        if self._owner == os.getpid():
            self._opened.close()

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._owner != os.getpid():  # SQLite has no connection that two processes may use
            raise WrongProcess(
                f"This store was opened by process {self._owner}, and this is process {os.getpid()}, which was forked "
                "from it. Open the store in this process.",
                owner=self._owner,
            )
        return self._opened

    def leave_to_parent(self) -> None:
        """In a forked child, never close what the parent has open."""
        keep_for_ever(self._opened)

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
        with reading(self.path):
            return facts_of_runs(self._connection, self._files.folder)

    def run(self, which: int | str | None = None) -> StoredRun:
        """Return one run.

        Args:
            which: its number, or its id, or as much of that as no other has; None or "last": the one that began last.

        Raises:
            StoreError: there is no such run, or several.
        """
        if which is not None and not is_count(which) and not isinstance(which, str):
            raise StoreError(
                f"which={shown(which)} is no run. Give its number from 1, its id, or None for the last.",
                path=str(self.path),
            )
        runs = self.runs()
        if which is None or which == "last":
            found = runs[-1:]
        elif isinstance(which, int) or which.isdecimal():
            found = [run for run in runs if run.number == int(which) or run.run_id == which]
        else:
            found = [run for run in runs if run.run_id.startswith(which)]
        if len(found) != 1:
            what = "no run" if which is None or which == "last" else f"no run {which!r}"
            fault = f"{len(found)} runs whose id begins with {which!r}" if found else what
            raise StoreError(
                f"the run store {str(self.path)!r} has {fault}. forgepar runs {self.path} lists those it has.",
                path=str(self.path),
            )
        return StoredRun(self, found[0].number)

    @contextmanager
    def _at_one_moment(self) -> Iterator[None]:
        """Have several looks see the store as it is at one moment."""
        try:
            self._rows("BEGIN")
            yield
        finally:
            if self._connection.in_transaction:
                self._rows("COMMIT")

    def _rows(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with telling(self.path):
            return self._connection.execute(statement, parameters).fetchall()


class StoredRun:
    """One run of a store; each look is at what the store has at that moment.

    Args:
        store: an open one.
        number: of the run.

    Attributes:
        number: of the run.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self.number = number
        self._known: _StoredPlan | None = None

    @property
    def facts(self) -> RunFacts:
        """What is known of it as a whole."""
        with reading(self._store.path):
            return _facts(self._row(f"SELECT {_FACTS} FROM runs WHERE id = ?"), self._store._files.folder)  # noqa: S608

    def table(self) -> RunTable:
        """Return what is known of its tasks as columns; of one that did not run yet the status is PENDING."""
        with self._store._at_one_moment():
            facts, plan, rows, failures = self.facts, self._plan(), self._rows(_TASKS), self.failures()
        columns = _Columns(len(plan.names), Status.PENDING if facts.status == "running" else Status.CANCELLED)
        with reading(self._store.path):
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
        """Return every attempt that failed."""
        found = self._rows(
            "SELECT task, attempt, start, seconds, worker, error, traceback FROM attempts WHERE run = ? ORDER BY 1, 2"
        )
        with reading(self._store.path):
            check_columns(found, _ATTEMPT_TYPES)
        return [
            FailedAttempt(
                task, attempt, _or_nan(start), _or_nan(seconds), -1 if worker is None else worker, error, trace
            )
            for task, attempt, start, seconds, worker, error, trace in found
        ]

    def events(self) -> Iterator[Event]:
        """Yield what happened in the run, in order, as far as it is written; that of tasks is made from their rows."""
        with self._store._at_one_moment():
            facts, plan = self.facts, self._plan()
            lines = self._rows("SELECT seq, line FROM events WHERE run = ?")
            rows = self._rows(_TASKS)
        with reading(self._store.path):
            told = [(seq, event_of(line.encode())) for seq, line in lines]
            check_columns(rows, _TASK_TYPES)
            for row in rows:
                told += _events_of(row, facts, plan.names, plan.layer)
            told.sort(key=lambda pair: pair[0])
        return (event for _, event in told)

    def stored_values(self) -> list[StoredValue]:
        """Return what values the store has of the run's tasks."""
        with self._store._at_one_moment():
            names, rows = self._plan().names, self._rows(_VALUES)
        found: dict[int, StoredValue] = {}
        with reading(self._store.path):
            check_columns(rows, ((int,), (int,), (int,), (bytes, type(None))))
            for task, maker, n_bytes, payload in rows:
                if payload is not None:
                    n_bytes = sum(name_and_lengths(payload)[1])
                found[task] = StoredValue(names[task], n_bytes, maker)
        return list(found.values())

    def value(self, name: str) -> Any:
        """Return the value of one of its tasks. It is unpickled, which runs the code of the store's owner.

        Raises:
            UnknownTask: the run has no task of this name.
            MissingResult: its value is not kept.
            StoreError: what is kept of it is damaged, or cannot be unpickled here.
        """
        check_instance("name", name, str, "the name of a task")
        names = self._plan().names
        if name not in names:
            raise UnknownTask(
                f"run {self.number} has no task named {name!r}. forgepar values {self._store.path} {self.number} lists "
                "those whose value is kept."
            )
        rows = self._rows(
            'SELECT fingerprint, kind, checksum, payload FROM tasks JOIN "values" USING (fingerprint) '
            'WHERE tasks.run = ? AND task = ? ORDER BY "values".run = coalesce(source, tasks.run) DESC',
            names.index(name),
        )
        if not rows and (became := next((other for other in names if other.startswith(f"{name}/output")), None)):
            raise MissingResult(
                f"the store has no value of task {name!r} of run {self.number}, as it became other tasks. "
                f"Ask for that of {became!r}."
            )
        if not rows:
            raise MissingResult(
                f"the store has no value of task {name!r} of run {self.number}: it did not complete, it cannot be "
                "compared with other runs (see RunResult.not_stored), or it was removed (forgepar gc)."
            )
        for fingerprint, kind, checksum, payload in rows:
            if is_whole(fingerprint, kind, checksum, payload):
                return self._unpickled(name, kind, payload)
        raise StoreError(
            f"the value of task {name!r} in {str(self._store.path)!r} was altered. Run the workflow again with resume.",
            path=str(self._store.path),
        )

    def _unpickled(self, name: str, kind: int, payload: bytes) -> Any:
        try:
            return value_of(kind, payload, self._store._files)
        except StoreError:
            raise
        except Exception as error:
            if is_system_error(error):
                raise StoreError(
                    f"the value of task {name!r} could not be read ({type(error).__name__}: {text_of(error)}).",
                    path=str(self._store.path),
                ) from error
            raise StoreError(
                f"the value of task {name!r} cannot be unpickled here ({type(error).__name__}: {error}). It needs the "
                "modules that it was made with: ask where they can be imported, as with PYTHONPATH.",
                path=str(self._store.path),
            ) from error

    def _plan(self) -> _StoredPlan:
        """Return what does not change while a run goes, unless tasks join it."""
        (n_tasks,) = self._row("SELECT n_tasks FROM runs WHERE id = ?")
        if self._known is None or len(self._known.names) != n_tasks:
            with reading(self._store.path):
                known = _stored_plan(*self._row(_PLAN))
                if not len(known.names) == len(known.callable_of) == n_tasks:
                    raise ValueError(f"{len(known.names)} names of {n_tasks} tasks")
            self._known = known
        return self._known

    def _row(self, statement: str) -> tuple[Any, ...]:
        """Return the one row that tells of the run as a whole."""
        rows = self._rows(statement)
        if not rows:
            raise StoreError(
                f"run {self.number} was removed from {str(self._store.path)!r} (forgepar gc) since it was looked up.",
                path=str(self._store.path),
            )
        return rows[0]

    def _rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._store._rows(statement, (self.number, *parameters))


_NUMBER, _OR_NONE = (int, float), (type(None),)
_INT, _TEXT = (int,), (str,)
_FACT_TYPES = (
    *(_INT, _TEXT, _TEXT, _TEXT, _NUMBER, _NUMBER + _OR_NONE, _NUMBER + _OR_NONE, _INT + _OR_NONE),
    *(_INT, _INT, _INT, _TEXT, _INT, _TEXT, _INT, _TEXT, _TEXT, _TEXT, _NUMBER),
)
_TASK_TYPES = (
    *(_INT, _INT, _INT + _OR_NONE, _INT + _OR_NONE, _INT, _NUMBER + _OR_NONE, _NUMBER + _OR_NONE),
    *(_INT + _OR_NONE, _INT, _TEXT + _OR_NONE),
)
_ATTEMPT_TYPES = (_INT, _INT, _NUMBER + _OR_NONE, _NUMBER + _OR_NONE, _INT + _OR_NONE, _TEXT, _TEXT)
_STATUSES = frozenset(map(int, Status))
_MOST_TIME = 250_000_000_000.0  # seconds: the year 9892, which calendars still know
_PLAN = "SELECT callables, callable_of, bases, base_of, ordinals, given_names, edges FROM runs WHERE id = ?"
_TASKS = (
    "SELECT task, status, source, seq, attempt, start, seconds, worker, bytes, error FROM tasks "
    "WHERE run = ? ORDER BY task"
)
_VALUES = (  # without values that are here, as they may be large: 2 is `priors.FILE`
    'SELECT task, "values".run, length(payload), CASE kind WHEN 2 THEN payload END '
    'FROM tasks JOIN "values" USING (fingerprint) WHERE tasks.run = ? '
    'AND "values".run = coalesce(source, tasks.run) ORDER BY task'
)


class _StoredPlan(NamedTuple):
    names: list[str]
    callables: list[str]
    callable_of: NDArray[np.int32]
    layer: NDArray[np.int32]
    sources: NDArray[np.int32]
    targets: NDArray[np.int32]


def _stored_plan(
    callables: bytes, callable_of: bytes, bases: bytes, base_of: bytes, ordinals: bytes, given: bytes, edges: bytes
) -> _StoredPlan:
    begins, ends = unpack_texts(bases), unpack_integers(edges)
    names = [
        f"{begins[base]}-{ordinal}" if ordinal >= 0 else begins[base]
        for base, ordinal in zip(unpack_integers(base_of).tolist(), unpack_integers(ordinals).tolist(), strict=True)
    ]
    texts = unpack_texts(given)
    for task, name in zip(texts[::2], texts[1::2], strict=True):
        names[int(task)] = name
    sources, targets = ends[: len(ends) // 2], ends[len(ends) // 2 :]
    called = unpack_integers(callable_of)
    if not all(type(text) is str for text in (*begins, *texts, *unpack_texts(callables))):
        raise ValueError("a name is no text")
    if len(called) and not 0 <= called.min() <= called.max() < len(unpack_texts(callables)):
        raise ValueError("a task calls what is not there")
    layer = longest_path_layers(Adjacency.from_edges(len(names), sources, targets))
    return _StoredPlan(names, unpack_texts(callables), unpack_integers(callable_of), layer, sources, targets)


def facts_of_runs(connection: sqlite3.Connection, folder: Path) -> list[RunFacts]:
    """Return the facts of all runs of a store, whose files are in ``folder``, in the order in which they began."""
    rows = connection.execute(f"SELECT {_FACTS} FROM runs ORDER BY id")  # noqa: S608  (a constant)
    return [_facts(row, folder) for row in rows]


class _Columns:
    """The columns of a table, as long as nothing is known of any task."""

    def __init__(self, n: int, status: Status) -> None:
        self.status = np.full(n, status, np.int8)
        self.start = np.full(n, np.nan)
        self.seconds = np.full(n, np.nan)
        self.worker = np.full(n, -1, np.int32)
        self.attempt = np.zeros(n, np.int32)
        self.bytes = np.zeros(n, np.int64)

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> dict[int, str]:
        """Fill in rows of tasks; return the errors among them."""
        if not rows:
            return {}
        check_columns(rows, _TASK_TYPES)
        if any(not 0 <= row[0] < len(self.status) for row in rows):
            raise ValueError("a row is of a task that is not there")
        if any(row[1] not in _STATUSES for row in rows):
            raise ValueError("a task has a status that there is not")
        task, status, _, _, attempt, start, seconds, worker, n_bytes, error = zip(*rows, strict=True)
        if any(bool((np.abs(np.array(column, np.float64)) >= _MOST_TIME).any()) for column in (start, seconds)):
            raise ValueError("a task has a time that cannot be")
        places = np.array(task)
        self.status[places] = status
        self.attempt[places] = attempt
        self.bytes[places] = n_bytes
        ran = np.array([value is not None for value in seconds])
        places = places[ran]
        self.start[places] = np.array(start, np.float64)[ran]
        self.seconds[places] = np.array(seconds, np.float64)[ran]
        self.worker[places] = np.array([-1 if value is None else value for value in worker])[ran]
        return {number: text for number, text in zip(task, error, strict=True) if text is not None}


def _events_of(
    row: tuple[Any, ...], facts: RunFacts, names: Sequence[str], layer: NDArray[np.int32]
) -> list[tuple[int, Event]]:
    """Make the events that the row of a task tells, each with its number; none where they were written down."""
    task, status, source, seq, attempt, start, seconds, worker, n_bytes, _ = row
    if seq is None:
        return []
    name, at, run_id = names[task], facts.began_at + start, facts.run_id
    if status == Status.CACHED:
        return [(seq, WorkflowTaskCached(at, name, seq=seq, run_id=run_id))]
    if status == Status.SKIPPED:
        return [(seq, WorkflowTaskSkipped(at, name, names[source], seq=seq, run_id=run_id))]
    began = WorkflowTaskStarted(at, name, int(layer[task]), attempt, worker, seq=seq, run_id=run_id)
    ended = WorkflowTaskCompleted(at + seconds, name, attempt, worker, seconds, n_bytes, seq=seq + 1, run_id=run_id)
    return [(seq, began), (seq + 1, ended)]


def _facts(row: tuple[Any, ...], folder: Path) -> RunFacts:
    check_columns([row], _FACT_TYPES)
    number, run_id, workflow, status, began, wall, cpu, rss, n_tasks, n_layers, workers, schedule, *rest = row
    if not 0 <= began < _MOST_TIME or not (0 <= workers <= MOST_WORKERS) or n_tasks < 0 or n_layers < 0:
        raise ValueError(f"run {number} has a time or a count that cannot be")
    if any(value is not None and not 0 <= value < _MOST_TIME for value in (wall, cpu)):
        raise ValueError(f"run {number} has a duration that cannot be")
    resumed, host, pid, started, python, forgepar, seen = rest
    if status == "running" and not _runs(life_file(folder, run_id), host, pid, started):
        status = "interrupted"
    if wall is None:
        wall = max(0.0, (time.time() if status == "running" else seen) - began)  # the clock may have been set
    return RunFacts(
        number,
        run_id,
        workflow,
        status,
        began,
        wall,
        cpu or 0.0,
        rss or 0,
        n_tasks,
        n_layers,
        workers,
        schedule,
        bool(resumed),
        host,
        pid,
        python,
        forgepar,
    )


def _runs(path: str, host: str, pid: int, started: str) -> bool:
    """Tell whether the program of a run is alive, also where that cannot be told.

    Args:
        path: the file that it holds, which is not there if an older version made the run.
        host: the name of its machine.
        pid: of the program there.
        started: when that did.
    """
    kernel, is_here = kernel_of(path), host == socket.gethostname()
    if kernel is None:
        return not is_here or start_time(pid) == started
    if is_here and kernel not in (NO_LOCK, kernel_id()):
        return False  # this machine was restarted since
    return bool(is_held(path))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


_open: weakref.WeakSet[Store] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for store in list(_open):
        store.leave_to_parent()
    _open.clear()


in_child(_leave_all_to_parent)
