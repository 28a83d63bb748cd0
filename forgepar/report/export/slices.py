"""The data of a trace as columns: slices in rows of workers, arrows between them, counters over time.

All times are integer nanoseconds since the run began, so that adjacent slices neither overlap nor have gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forgepar.records.table import RunTable
from forgepar.scheduling.run_state import Status

Nanoseconds: TypeAlias = NDArray[np.int64]

# The difference of clocks: two tasks of a worker that overlap by at most this ran one after the other.
_TOLERANCE = 2_000
_NEVER = np.iinfo(np.int64).max


class AttemptSlices(NamedTuple):
    """Attempts with known times, sorted by start. Slices of a row do not overlap.

    Attributes:
        task: the task of each slice.
        attempt: the number of the attempt, from 1.
        failure: index of the failed attempt in the table, -1 for the last attempt of a task.
        row: the row in which it is drawn.
        begin: when it began.
        end: when it ended, always after ``begin``; for a running one, the time of the table.
        rows: the worker of each row; a worker with attempts that overlap has several rows.
        last_of: for each task, the slice of its last attempt; -1 if it has none.
    """

    task: NDArray[np.int64]
    attempt: NDArray[np.int64]
    failure: NDArray[np.int64]
    row: NDArray[np.int64]
    begin: Nanoseconds
    end: Nanoseconds
    rows: Sequence[int]
    last_of: NDArray[np.int64]


class DependencyArrows(NamedTuple):
    """Dependencies between slices.

    Attributes:
        source: the slice of the task that was waited for.
        target: the slice of the task that waited.
        leaves: the time of the start of the arrow, within the source.
        n_left_out: number of dependencies that are left out.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    leaves: Nanoseconds
    n_left_out: int


class CounterTrack(NamedTuple):
    """A quantity over time: ``value[i]`` from ``at[i]`` to ``at[i + 1]``."""

    at: Nanoseconds
    value: NDArray[np.int64]


def slices_of(table: RunTable) -> AttemptSlices:
    """Return the attempts of a run that have known times."""
    begun = np.flatnonzero(np.isfinite(table.start))
    extra = [number for number, failure in enumerate(table.failures) if _is_earlier(table, number)]
    failures = [table.failures[number] for number in extra]
    start = np.append(table.start[begun], [failure.start for failure in failures])
    stop = np.append(_ends(table)[begun], [failure.start + failure.seconds for failure in failures])
    task = np.append(begun, [failure.task for failure in failures]).astype(np.int64)
    attempt = np.append(table.attempt[begun], [failure.attempt for failure in failures]).astype(np.int64)
    worker = np.append(table.worker[begun], [failure.worker for failure in failures]).astype(np.int64)
    failure = np.append(np.full(len(begun), -1), extra).astype(np.int64)
    begin, end = (np.rint(np.maximum(times, 0) * 1e9).astype(np.int64) for times in (start, stop))
    order = np.lexsort((end, begin, worker))
    row, begin, end, rows = _in_rows(worker[order], begin[order], end[order])
    by_time = np.argsort(begin, kind="stable")
    order = order[by_time]
    task, failure = task[order], failure[order]
    last_of = np.full(len(table), -1, np.int64)
    last_of[task[failure < 0]] = np.flatnonzero(failure < 0)
    return AttemptSlices(task, attempt[order], failure, row[by_time], begin[by_time], end[by_time], rows, last_of)


def _is_earlier(table: RunTable, number: int) -> bool:
    """Return whether a failed attempt has known times and is not the attempt in the row of its task."""
    failure = table.failures[number]
    if not math.isfinite(failure.start) or not math.isfinite(failure.seconds):
        return False
    return failure.attempt != table.attempt[failure.task] or not math.isfinite(table.start[failure.task])


def _ends(table: RunTable) -> NDArray[np.float64]:
    """Return when each task ended; for a running task, the current time of the run."""
    running = table.status_of == Status.RUNNING
    still = np.where(running, np.maximum(table.wall_seconds, table.start), table.start)
    ends: NDArray[np.float64] = np.where(np.isfinite(table.seconds), table.start + table.seconds, still)
    return ends


def _in_rows(
    worker: NDArray[np.int64], begin: Nanoseconds, end: Nanoseconds
) -> tuple[NDArray[np.int64], Nanoseconds, Nanoseconds, list[int]]:
    """Assign slices, sorted by worker and begin, to rows in which each ends before the next one begins."""
    rows: list[int] = []
    free_at: list[int] = []
    first, found, begins, ends = 0, [], [], []
    for slot, start, stop in zip(worker.tolist(), begin.tolist(), end.tolist(), strict=True):
        if not rows or rows[-1] != slot:
            first = len(rows)
        row = next((row for row in range(first, len(rows)) if free_at[row] <= start + _TOLERANCE), len(rows))
        if row == len(rows):
            rows.append(slot)
            free_at.append(start)
        start = max(start, free_at[row])
        free_at[row] = max(stop, start + 1)  # a slice of length 0 would be invisible and could not have an arrow
        found.append(row)
        begins.append(start)
        ends.append(free_at[row])
    as_array: Any = [np.array(column, np.int64) for column in (found, begins, ends)]
    return (*as_array, rows)


def arrows_of(table: RunTable, slices: AttemptSlices, most: int) -> DependencyArrows:
    """Return the dependencies between tasks that both ran.

    If there are more than ``most``, the dependency that ended last is kept for each task, first for the longest tasks.
    """
    pairs = np.unique(table.sources.astype(np.int64) * len(table) + table.targets)
    source, target = (slices.last_of[tasks] for tasks in np.divmod(pairs, max(len(table), 1)))
    both_ran = (source >= 0) & (target >= 0)
    source, target = source[both_ran], target[both_ran]
    # If clocks differ, a task can begin before its dependency; its arrow would point backwards.
    forwards = slices.begin[source] <= slices.begin[target]
    source, target = source[forwards], target[forwards]
    n_left_out = max(len(source) - most, 0)
    if n_left_out:
        seconds = slices.end[target] - slices.begin[target]
        by_end = np.lexsort((-slices.end[source], target))
        decides = np.zeros(len(source), np.bool_)
        decides[by_end[np.diff(target[by_end], prepend=-1) != 0]] = True
        kept = np.sort(np.lexsort((-seconds, ~decides))[:most])
        source, target = source[kept], target[kept]
    return DependencyArrows(source, target, np.minimum(slices.end[source] - 1, slices.begin[target]), n_left_out)


def bytes_held(table: RunTable, slices: AttemptSlices) -> CounterTrack:
    """Return the bytes of values in memory: each from the end of its task to the end of its last consumer.

    Values without a consumer stay in memory to the end of the run, as do those that a task still waits for.
    """
    done = np.isin(table.status_of, [Status.COMPLETED, Status.COMPENSATED]) & (slices.last_of >= 0) & (table.bytes > 0)
    producers = np.flatnonzero(done)
    ends = _last_ends(slices)
    waits = np.isin(table.status_of, [Status.PENDING, Status.RUNNING])
    until = np.zeros(len(table), np.int64)
    np.maximum.at(until, table.sources, np.where(waits, _NEVER, ends)[table.targets])
    until = np.where(until == 0, _NEVER, np.maximum(until, ends))
    freed = producers[until[producers] < _NEVER]
    at = np.concatenate([ends[producers], until[freed]])
    return _summed(at, np.concatenate([table.bytes[producers], -table.bytes[freed]]))


def queue_length(table: RunTable, slices: AttemptSlices) -> CounterTrack:
    """Return the number of ready tasks that have not begun, of the tasks that ran.

    With the schedule "layers", a task is ready when the last task of the previous layers has ended.
    """
    ran = np.flatnonzero(slices.last_of >= 0)
    if not len(ran):
        return CounterTrack(np.zeros(0, np.int64), np.zeros(0, np.int64))
    begin = np.full(len(table), _NEVER)
    np.minimum.at(begin, slices.task, slices.begin)  # begin of the first attempt
    end = _last_ends(slices)
    if table.schedule == "eager":
        ready = np.zeros(len(table), np.int64)
        np.maximum.at(ready, table.targets, end[table.sources])
    else:
        done = np.zeros(int(table.layer.max()) + 2, np.int64)
        np.maximum.at(done, table.layer + 1, end)
        ready = np.maximum.accumulate(done)[table.layer]
    ready = np.minimum(ready, begin)[ran]
    return _summed(np.concatenate([ready, begin[ran]]), np.repeat([1, -1], len(ran)))


def _last_ends(slices: AttemptSlices) -> Nanoseconds:
    """Return when the last attempt of each task ended; 0 if it did not run."""
    ends = np.zeros(len(slices.last_of), np.int64)
    ran = slices.last_of >= 0
    ends[ran] = slices.end[slices.last_of[ran]]
    return ends


def layer_begins(table: RunTable, slices: AttemptSlices) -> tuple[NDArray[np.int64], Nanoseconds]:
    """Return the layers in which a task ran, and when the first of its tasks began."""
    layer = table.layer[slices.task].astype(np.int64)
    layers, first = np.unique(layer, return_index=True)  # slices are sorted by begin
    return layers, slices.begin[first]


def thinned(counter: CounterTrack, most: int) -> CounterTrack:
    """Reduce a counter to at most ``most`` points: of each stretch, the highest and the last."""
    n = len(counter.at)
    if n <= most:
        return counter
    stretch = np.arange(n) * (most // 2) // n
    last = np.flatnonzero(np.diff(stretch, append=-1))
    highest = np.lexsort((counter.value, stretch))[last]
    kept = np.unique(np.concatenate([highest, last]))
    return CounterTrack(counter.at[kept], counter.value[kept])


def _summed(at: Nanoseconds, change: NDArray[np.int64]) -> CounterTrack:
    """Return the running sum of changes, with one point per time at which it changes."""
    times, place = np.unique(at, return_inverse=True)
    step = np.zeros(len(times), np.int64)
    np.add.at(step, place, change)
    changes = step != 0
    return CounterTrack(times[changes], np.cumsum(step)[changes])
