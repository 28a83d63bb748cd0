"""The data of a report's charts, as columns computed with numpy from a `RunTable`.

RunTable ──> tasks on their workers, bands and idle time of layers, use and memory over time, the critical path
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgepar.graph import Adjacency, critical_path
from forgepar.records.table import RunTable
from forgepar.scheduling.run_state import Status

MOST_STEPS = 800  # of a line over time: fewer than a screen has pixels across
MOST_IDLE = 20_000  # rectangles of idle time that are drawn, the longest
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})", re.DOTALL)
_MOST_TEXT = 4_000_000  # characters of all names in a report; above that, long names are cut in the middle
_FEWEST_CHARACTERS = 24
_MOST_CELLS = 10_000_000  # layers times workers; above that, idle time is not computed

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class NameParts:
    """Names of tasks as stem and number, such as "load-" and 7. A stem that tasks share is stored once.

    Attributes:
        stems: (k,) distinct texts.
        stem_of: (n,) index into ``stems``.
        number_of: (n,) the number after the stem, -1 for none.
    """

    stems: list[str]
    stem_of: Ints
    number_of: Ints

    @classmethod
    def of(cls, names: Sequence[str]) -> NameParts:
        """Split names.

        Example:
            >>> names = NameParts.of(["load-0", "load-1", "join"])
            >>> names.stems, names.stem_of.tolist(), names.number_of.tolist()
            (['load-', 'join'], [0, 0, 1], [0, 1, -1])
        """
        known: dict[str, int] = {}
        stem_of, number_of = np.zeros(len(names), np.int32), np.full(len(names), -1, np.int32)
        for i, name in enumerate(names):
            found = _NUMBERED.fullmatch(name)
            stem = name if found is None else found[1]
            stem_of[i] = known.setdefault(stem, len(known))
            if found is not None:
                number_of[i] = int(found[2])
        return cls(_shortened(list(known)), stem_of, number_of)


@dataclass(frozen=True, eq=False)
class TaskIntervals:
    """The tasks that ran, sorted by start.

    Attributes:
        task: (n,) the number of the task.
        left: (n,) when it began, in seconds since the run began.
        right: (n,) when it ended.
    """

    task: Ints
    left: Floats
    right: Floats

    @classmethod
    def of(cls, table: RunTable) -> TaskIntervals:
        """Select the tasks of a run with known times and worker."""
        ran = table.ran()
        ran = ran[np.isfinite(table.start[ran]) & (table.worker[ran] >= 0)]
        ran = ran[np.argsort(table.start[ran], kind="stable")]
        return cls(ran, table.start[ran], table.start[ran] + table.seconds[ran])

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True, eq=False)
class RowIntervals:
    """Intervals of time, each of a layer or of a worker.

    Attributes:
        left: (n,) begin, in seconds since the run began.
        right: (n,) end, likewise.
        row: (n,) the number of the layer or the worker.
    """

    left: Floats
    right: Floats
    row: Ints

    def __len__(self) -> int:
        return len(self.left)


_NO_INTERVALS = RowIntervals(np.zeros(0), np.zeros(0), np.zeros(0, np.int32))


@dataclass(frozen=True, eq=False)
class StepLine:
    """A quantity over time: ``value[i]`` from ``at[i]`` to ``at[i + 1]``.

    Attributes:
        at: (n + 1,) seconds since the run began.
        value: (n,) the values.
        step_seconds: the interval over which each value is aggregated, in seconds; 0 if the values are exact.
    """

    at: Floats
    value: Floats
    step_seconds: float


def n_rows(table: RunTable) -> int:
    """Return the number of workers in a timeline."""
    return max(table.n_workers, int(table.worker.max(initial=-1)) + 1, 1)


def end_of(table: RunTable, intervals: TaskIntervals) -> float:
    """Return when a run ended, in seconds since it began; its tasks may end after the recorded end of a killed run."""
    return max(table.wall_seconds, float(intervals.right.max(initial=0.0)))


def bands(table: RunTable, intervals: TaskIntervals) -> RowIntervals:
    """Return one interval per layer, from the start of its first task to the end of its last; none for eager runs."""
    order = np.argsort(table.layer[intervals.task], kind="stable")
    layers, starts = _groups(table.layer[intervals.task][order])
    if not len(layers) or table.schedule != "layers":
        return _NO_INTERVALS
    left, right = (
        np.minimum.reduceat(intervals.left[order], starts),
        np.maximum.reduceat(intervals.right[order], starts),
    )
    return RowIntervals(left, right, layers)


def idle(table: RunTable, intervals: TaskIntervals, layers: RowIntervals) -> tuple[RowIntervals, float]:
    """Return the longest waits of workers for the end of a layer, and the sum of all waits in worker-seconds."""
    n_workers, n_layers = n_rows(table), len(layers)
    if not n_layers:
        return _NO_INTERVALS, 0.0
    if n_workers * n_layers > _MOST_CELLS:
        return _NO_INTERVALS, float("nan")
    done = np.repeat(layers.left[:, None], n_workers, axis=1)  # a worker without a task waits from the start
    place = np.searchsorted(layers.row, table.layer[intervals.task])
    np.maximum.at(done, (place, table.worker[intervals.task]), intervals.right)
    waited = layers.right[:, None] - done
    total = float(waited.sum())
    layer, worker = np.nonzero(waited > 0)
    if len(layer) > MOST_IDLE:
        longest = np.argpartition(-waited[layer, worker], MOST_IDLE)[:MOST_IDLE]
        layer, worker = layer[longest], worker[longest]
    return RowIntervals(done[layer, worker], layers.right[layer], worker.astype(np.int32)), total


def busy_workers(intervals: TaskIntervals, end: float) -> StepLine:
    """Return how many workers were busy over time; for long runs, the mean of each step."""
    return _over_time(intervals.left, intervals.right, np.ones(len(intervals)), end, takes_most=False)


def held_bytes(table: RunTable, intervals: TaskIntervals, end: float) -> StepLine:
    """Return the bytes of values in memory over time; for long runs, the maximum of each step.

    A value is in memory from the end of its task to the end of the last task that depends on it and ran, or to the end
    of the run if there is none.
    """
    last, ended = np.full(len(table), -np.inf), np.full(len(table), -np.inf)
    ended[intervals.task] = intervals.right
    np.maximum.at(last, table.sources, ended[table.targets])
    last[np.isneginf(last)] = end
    good = (Status.COMPLETED, Status.COMPENSATED)
    made = intervals.task[np.isin(table.status_of[intervals.task], good) & (table.bytes[intervals.task] > 0)]
    left = np.minimum(ended[made], end)
    right = np.maximum(last[made], left)
    return _over_time(left, right, table.bytes[made].astype(np.float64), end, takes_most=True)


def heaviest_path(table: RunTable) -> tuple[list[int], float]:
    """Return those tasks of the critical path that ran, in order, and the sum of their durations."""
    graph = Adjacency.from_edges(len(table), table.sources, table.targets)
    path, seconds = critical_path(graph, np.nan_to_num(table.seconds, nan=0.0))
    return [task for task in path if np.isfinite(table.seconds[task])], seconds


def callables_by_work(table: RunTable, intervals: TaskIntervals) -> Ints:
    """Return the callables that ran, sorted by total time, the most first."""
    work = np.bincount(table.callable_of[intervals.task], intervals.right - intervals.left, len(table.callables))
    n_tasks = np.bincount(table.callable_of[intervals.task], minlength=len(table.callables))
    order = np.lexsort((np.arange(len(work)), -work))
    return order[n_tasks[order] > 0].astype(np.int32)


def smallest(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Convert integers to the smallest type that fits and that browsers have typed arrays for, else to float64."""
    for kind in (np.uint8, np.uint16, np.int32, np.uint32):
        info = np.iinfo(kind)
        if not len(values) or (values.min() >= info.min and values.max() <= info.max):
            return values.astype(kind)
    return values.astype(np.float64)


def _over_time(left: Floats, right: Floats, weight: Floats, end: float, *, takes_most: bool) -> StepLine:
    times = np.concatenate([left, right])
    order = np.argsort(times, kind="stable")
    times = np.concatenate([[0.0], times[order], [max(end, 0.0)]])
    level = np.concatenate([[0.0], np.cumsum(np.concatenate([weight, -weight])[order])])
    level = np.maximum(np.round(level, 6), 0.0)
    keeps = np.diff(times) > 0
    if int(keeps.sum()) <= MOST_STEPS:
        starts = np.flatnonzero(keeps)
        return StepLine(np.append(times[starts], times[-1]), level[starts], 0.0)
    edges = np.linspace(0.0, times[-1], MOST_STEPS + 1)
    step = float(edges[1])
    if takes_most:
        return StepLine(edges, _most_within(times, level, edges), step)
    area = np.concatenate([[0.0], np.cumsum(level * np.diff(times))])
    return StepLine(edges, np.diff(np.interp(edges, times, area)) / step, step)


def _most_within(times: Floats, level: Floats, edges: Floats) -> Floats:
    """Return the highest level within each step: the level at its start, or one that starts within it."""
    at_start = level[np.clip(np.searchsorted(times, edges[:-1], side="right") - 1, 0, len(level) - 1)]
    place = np.clip(np.searchsorted(edges, times[:-1], side="right") - 1, 0, len(edges) - 2)
    lasts = np.diff(times) > 0
    np.maximum.at(at_start, place[lasts], level[lasts])
    return at_start


def _groups(ordered: Ints) -> tuple[Ints, NDArray[np.intp]]:
    """Return the distinct values of sorted numbers, and the index where each begins."""
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(ordered) else np.zeros(0, np.intp)
    return ordered[starts], starts


def _shortened(stems: list[str]) -> list[str]:
    """Cut long texts in the middle if all texts together are too long."""
    if sum(map(len, stems)) <= _MOST_TEXT:
        return stems
    most = max(_MOST_TEXT // len(stems), _FEWEST_CHARACTERS)
    return [stem if len(stem) <= most else f"{stem[: most // 2]}…{stem[-(most - most // 2 - 1) :]}" for stem in stems]
