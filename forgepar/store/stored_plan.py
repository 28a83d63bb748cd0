"""The tasks of a stored run: their names, callables and layers, and their rows as columns of a table and as events.

    row of runs   ──> StoredPlan
    rows of tasks ──> StoredColumns, events

Each function raises ValueError if a row is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.graph import Adjacency, longest_path_layers
from forgepar.records.events import (
    Event,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
)
from forgepar.scheduling.run_state import Status
from forgepar.store.columns import (
    INTEGER,
    MOST_SECONDS,
    NONE,
    NUMBER,
    TEXT,
    check_columns,
    unpack_integers,
    unpack_texts,
)
from forgepar.store.run_facts import RunFacts

SELECT_PLAN = "SELECT callables, callable_of, bases, base_of, ordinals, given_names, edges FROM runs WHERE id = ?"
SELECT_TASKS = (
    "SELECT task, status, source, seq, attempt, start, seconds, worker, bytes, error FROM tasks "
    "WHERE run = ? ORDER BY task"
)
_TYPES = (
    *(INTEGER, INTEGER, INTEGER + NONE, INTEGER + NONE, INTEGER, NUMBER + NONE, NUMBER + NONE),
    *(INTEGER + NONE, INTEGER, TEXT + NONE),
)
_STATUSES = frozenset(map(int, Status))


class StoredPlan(NamedTuple):
    """The plan of a stored run.

    Attributes:
        names: of its tasks.
        callables: names of the functions that tasks call.
        callable_of: (n_tasks,) index into ``callables``.
        layer: (n_tasks,) of each task.
        sources: (n_edges,) task at which each edge starts.
        targets: (n_edges,) task that depends on it.
    """

    names: list[str]
    callables: list[str]
    callable_of: NDArray[np.int32]
    layer: NDArray[np.int32]
    sources: NDArray[np.int32]
    targets: NDArray[np.int32]


def stored_plan(row: Sequence[bytes], n_tasks: int) -> StoredPlan:
    """Return the plan from a row of `SELECT_PLAN`."""
    packed_callables, callable_of, bases, base_of, ordinals, given, edges = row
    callables, begins, ends = unpack_texts(packed_callables), unpack_texts(bases), unpack_integers(edges)
    names = [
        f"{begins[base]}-{ordinal}" if ordinal >= 0 else begins[base]
        for base, ordinal in zip(unpack_integers(base_of).tolist(), unpack_integers(ordinals).tolist(), strict=True)
    ]
    texts = unpack_texts(given)
    for task, name in zip(texts[::2], texts[1::2], strict=True):
        names[int(task)] = name
    sources, targets = ends[: len(ends) // 2], ends[len(ends) // 2 :]
    called = unpack_integers(callable_of)
    if not all(type(text) is str for text in (*begins, *texts, *callables)):
        raise ValueError("a name is not a text")
    if len(called) and not 0 <= called.min() <= called.max() < len(callables):
        raise ValueError("the index of a callable is out of range")
    if not len(names) == len(called) == n_tasks:
        raise ValueError(f"{len(names)} names of {n_tasks} tasks")
    layer = longest_path_layers(Adjacency.from_edges(len(names), sources, targets))
    return StoredPlan(names, callables, called, layer, sources, targets)


class StoredColumns:
    """Columns of a `RunTable` for n tasks, filled from rows of `SELECT_TASKS`.

    Args:
        n: number of tasks.
        status: of tasks that have no row.
    """

    def __init__(self, n: int, status: Status) -> None:
        self.status = np.full(n, status, np.int8)
        self.start = np.full(n, np.nan)
        self.seconds = np.full(n, np.nan)
        self.worker = np.full(n, -1, np.int32)
        self.attempt = np.zeros(n, np.int32)
        self.bytes = np.zeros(n, np.int64)

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> dict[int, str]:
        """Fill the columns; return the errors of tasks that failed."""
        if not rows:
            return {}
        check_columns(rows, _TYPES)
        if any(not 0 <= row[0] < len(self.status) for row in rows):
            raise ValueError("the number of a task is out of range")
        if any(row[1] not in _STATUSES for row in rows):
            raise ValueError("a task has an unknown status")
        task, status, _, _, attempt, start, seconds, worker, n_bytes, error = zip(*rows, strict=True)
        if any(bool((np.abs(np.array(column, np.float64)) >= MOST_SECONDS).any()) for column in (start, seconds)):
            raise ValueError("a task has an impossible time")
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


def events_of_tasks(rows: Sequence[tuple[Any, ...]], facts: RunFacts, plan: StoredPlan) -> list[tuple[int, Event]]:
    """Return the events that are not stored but made from rows of `SELECT_TASKS`, each with its number."""
    check_columns(rows, _TYPES)
    found: list[tuple[int, Event]] = []
    for task, status, source, seq, attempt, start, seconds, worker, n_bytes, _ in rows:
        if seq is None:  # table ``events`` has the events of this task
            continue
        name, at, run_id = plan.names[task], facts.began_at + start, facts.run_id
        if status == Status.CACHED:
            found.append((seq, WorkflowTaskCached(at, name, seq=seq, run_id=run_id)))
        elif status == Status.SKIPPED:
            found.append((seq, WorkflowTaskSkipped(at, name, plan.names[source], seq=seq, run_id=run_id)))
        else:
            began = WorkflowTaskStarted(at, name, int(plan.layer[task]), attempt, worker, seq=seq, run_id=run_id)
            ended = WorkflowTaskCompleted(
                at + seconds, name, attempt, worker, seconds, n_bytes, seq=seq + 1, run_id=run_id
            )
            found += [(seq, began), (seq + 1, ended)]
    return found
