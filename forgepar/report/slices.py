"""What a run did when, as columns: slices in rows of workers, arrows between them, counters over time.

All times are whole nanoseconds since the run began, so that what touches in a row neither overlaps nor comes apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forgepar.runstate import Status
from forgepar.runtable import RunTable

Nanoseconds: TypeAlias = NDArray[np.int64]

# What clocks may be apart: two tasks of one worker that overlap by less ran one after the other.
_TOLERANCE = 2_000
_NEVER = np.iinfo(np.int64).max


class Slices(NamedTuple):
    """Attempts whose times are known, in the order in which they began; a row holds no two at a time.

    Attributes:
        task: of each.
        attempt: which of the task's attempts, from 1.
        failure: number of the failed attempt among the table's, -1 for a task's last attempt.
        row: where it is drawn.
        begin: when it began.
        end: when it ended, after that; of one that still runs, when the run was looked at.
        rows: the worker of each row; one that did several things at a time has several rows.
        last_of: for each task, the slice of its last attempt; -1: it has none.
    """

    task: NDArray[np.int64]
    attempt: NDArray[np.int64]
    failure: NDArray[np.int64]
    row: NDArray[np.int64]
    begin: Nanoseconds
    end: Nanoseconds
    rows: Sequence[int]
    last_of: NDArray[np.int64]


class Arrows(NamedTuple):
    """Dependencies between slices.

    Attributes:
        source: the slice whose task was waited for.
        target: the slice whose task waited.
        leaves: when to draw its begin, within the source.
        n_left_out: how many more there are than were asked for.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    leaves: Nanoseconds
    n_left_out: int


class Counter(NamedTuple):
    """A figure over time: from each time on, until the next, it has this value."""

    at: Nanoseconds
    value: NDArray[np.int64]


def slices_of(table: RunTable) -> Slices:
    """Return the attempts of a run whose times are known."""
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
    return Slices(task, attempt[order], failure, row[by_time], begin[by_time], end[by_time], rows, last_of)


def _is_earlier(table: RunTable, number: int) -> bool:
    """Tell whether the times of a failed attempt are known and no other than those of its task's row."""
    failure = table.failures[number]
    if not math.isfinite(failure.start) or not math.isfinite(failure.seconds):
        return False
    return failure.attempt != table.attempt[failure.task] or not math.isfinite(table.start[failure.task])


def _ends(table: RunTable) -> NDArray[np.float64]:
    """Return when each task ended; of one that runs, how far the run is."""
    running = table.status_of == Status.RUNNING
    still = np.where(running, np.maximum(table.wall_seconds, table.start), table.start)
    ends: NDArray[np.float64] = np.where(np.isfinite(table.seconds), table.start + table.seconds, still)
    return ends


def _in_rows(
    worker: NDArray[np.int64], begin: Nanoseconds, end: Nanoseconds
) -> tuple[NDArray[np.int64], Nanoseconds, Nanoseconds, list[int]]:
    """Put slices that are sorted by worker and begin into rows, where each ends before the next one begins."""
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
        free_at[row] = max(stop, start + 1)  # a slice of no length would not be seen, nor hold an arrow
        found.append(row)
        begins.append(start)
        ends.append(free_at[row])
    as_array: Any = [np.array(column, np.int64) for column in (found, begins, ends)]
    return (*as_array, rows)


def arrows_of(table: RunTable, slices: Slices, most: int) -> Arrows:
    """Return the dependencies between tasks that both ran.

    Of more than ``most``, those are left out that decided nothing: first come, for each task, the dependency that was
    done last, and among these the ones of the longest tasks.
    """
    pairs = np.unique(table.sources.astype(np.int64) * len(table) + table.targets)
    source, target = (slices.last_of[tasks] for tasks in np.divmod(pairs, max(len(table), 1)))
    both_ran = (source >= 0) & (target >= 0)
    source, target = source[both_ran], target[both_ran]
    # A task that began before what it waited for shows clocks that differ; its arrow would point backwards.
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
    return Arrows(source, target, np.minimum(slices.end[source] - 1, slices.begin[target]), n_left_out)


def bytes_held(table: RunTable, slices: Slices) -> Counter:
    """Return how many bytes the values of tasks took: each from its task's end to the end of the last that took it.

    Values that no task took are held to the end of the run, as are those that a task still waits for.
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


def queue_length(table: RunTable, slices: Slices) -> Counter:
    """Return how many tasks could have begun and had not: of those that did at last.

    Under the schedule "layers" a task is ready when the last one of the layers before its own is done.
    """
    ran = np.flatnonzero(slices.last_of >= 0)
    if not len(ran):
        return Counter(np.zeros(0, np.int64), np.zeros(0, np.int64))
    begin = np.full(len(table), _NEVER)
    np.minimum.at(begin, slices.task, slices.begin)  # of its first attempt
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


def _last_ends(slices: Slices) -> Nanoseconds:
    """Return when the last attempt of each task ended; 0: it did not run."""
    ends = np.zeros(len(slices.last_of), np.int64)
    ran = slices.last_of >= 0
    ends[ran] = slices.end[slices.last_of[ran]]
    return ends


def layer_begins(table: RunTable, slices: Slices) -> tuple[NDArray[np.int64], Nanoseconds]:
    """Return the layers in which a task ran, and when the first of its tasks began."""
    layer = table.layer[slices.task].astype(np.int64)
    layers, first = np.unique(layer, return_index=True)  # slices are in the order in which they began
    return layers, slices.begin[first]


def thinned(counter: Counter, most: int) -> Counter:
    """Return a counter of so many points at the most, its peaks kept: of each stretch the highest and the last."""
    n = len(counter.at)
    if n <= most:
        return counter
    stretch = np.arange(n) * (most // 2) // n
    last = np.flatnonzero(np.diff(stretch, append=-1))
    highest = np.lexsort((counter.value, stretch))[last]
    kept = np.unique(np.concatenate([highest, last]))
    return Counter(counter.at[kept], counter.value[kept])


def _summed(at: Nanoseconds, change: NDArray[np.int64]) -> Counter:
    """Return the running sum of changes, one point for all that are at one time, and none where nothing changes."""
    times, place = np.unique(at, return_inverse=True)
    step = np.zeros(len(times), np.int64)
    np.add.at(step, place, change)
    changes = step != 0
    return Counter(times[changes], np.cumsum(step)[changes])
