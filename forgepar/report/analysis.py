"""What a report shows of a run, as columns: pure numpy from a `RunTable`, nothing drawn.

RunTable ──> Bars (tasks on their workers), bands and idle time of layers, use and memory over time, the heaviest path
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgepar.graph import Adjacency, critical_path
from forgepar.runstate import Status
from forgepar.runtable import RunTable

MOST_STEPS = 800  # of a line over time: fewer than a screen has columns of pixels
MOST_IDLE = 20_000  # rectangles of idle time, the longest ones
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})", re.DOTALL)
_MOST_TEXT = 4_000_000  # characters of names that a report holds; longer ones are cut in the middle
_FEWEST_CHARACTERS = 24
_MOST_CELLS = 10_000_000  # layers times workers, up to which idle time is looked for

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Names:
    """Names of tasks: a stem each, and a number behind it; -1 for none. What tasks share is there once.

    Attributes:
        stems: (k,) texts, each once.
        stem_of: (n,) which of them.
        number_of: (n,) the number.
    """

    stems: list[str]
    stem_of: Ints
    number_of: Ints

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Take names apart.

        Example:
            >>> names = Names.of(["load-0", "load-1", "join"])
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
class Bars:
    """A bar for each task that ran.

    Attributes:
        task: (n,) which, by number, by start.
        left: (n,) when it began, seconds since the run did.
        right: (n,) when it ended.
    """

    task: Ints
    left: Floats
    right: Floats

    @classmethod
    def of(cls, table: RunTable) -> Bars:
        """Take those of a run whose times and worker are known."""
        ran = table.ran()
        ran = ran[np.isfinite(table.start[ran]) & (table.worker[ran] >= 0)]
        ran = ran[np.argsort(table.start[ran], kind="stable")]
        return cls(ran, table.start[ran], table.start[ran] + table.seconds[ran])

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of time.

    Attributes:
        left: (n,) seconds since the run began.
        right: (n,) likewise.
        row: (n,) the layer or the worker.
    """

    left: Floats
    right: Floats
    row: Ints

    def __len__(self) -> int:
        return len(self.left)


_NOWHERE = Spans(np.zeros(0), np.zeros(0), np.zeros(0, np.int32))


@dataclass(frozen=True, eq=False)
class Steps:
    """A line over time: ``value[i]`` from ``at[i]`` to ``at[i + 1]``.

    Attributes:
        at: (n + 1,) seconds since the run began.
        value: (n,) what it was.
        step_seconds: over how long each value was taken together; 0: it is exact.
    """

    at: Floats
    value: Floats
    step_seconds: float


def n_rows(table: RunTable) -> int:
    """Return how many workers a timeline has."""
    return max(table.n_workers, int(table.worker.max(initial=-1)) + 1, 1)


def end_of(table: RunTable, bars: Bars) -> float:
    """Return when a run ended, seconds since it began: a run that was cut off may tell less than its tasks."""
    return max(table.wall_seconds, float(bars.right.max(initial=0.0)))


def bands(table: RunTable, bars: Bars) -> Spans:
    """Return a stretch for each layer, from the start of its first task to the end of its last; none of eager runs."""
    order = np.argsort(table.layer[bars.task], kind="stable")
    layers, starts = _groups(table.layer[bars.task][order])
    if not len(layers) or table.schedule != "layers":
        return _NOWHERE
    left, right = np.minimum.reduceat(bars.left[order], starts), np.maximum.reduceat(bars.right[order], starts)
    return Spans(left, right, layers)


def idle(table: RunTable, bars: Bars, layers: Spans) -> tuple[Spans, float]:
    """Return how long workers waited for the end of a layer, the longest stretches, and the worker-seconds of all."""
    n_workers, n_layers = n_rows(table), len(layers)
    if not n_layers:
        return _NOWHERE, 0.0
    if n_workers * n_layers > _MOST_CELLS:
        return _NOWHERE, float("nan")
    done = np.repeat(layers.left[:, None], n_workers, axis=1)  # a worker that got nothing waits from the start
    place = np.searchsorted(layers.row, table.layer[bars.task])
    np.maximum.at(done, (place, table.worker[bars.task]), bars.right)
    waited = layers.right[:, None] - done
    total = float(waited.sum())
    layer, worker = np.nonzero(waited > 0)
    if len(layer) > MOST_IDLE:
        longest = np.argpartition(-waited[layer, worker], MOST_IDLE)[:MOST_IDLE]
        layer, worker = layer[longest], worker[longest]
    return Spans(done[layer, worker], layers.right[layer], worker.astype(np.int32)), total


def busy_workers(bars: Bars, end: float) -> Steps:
    """Return how many workers were busy over time; of long runs the mean of each step."""
    return _over_time(bars.left, bars.right, np.ones(len(bars)), end, takes_most=False)


def held_bytes(table: RunTable, bars: Bars, end: float) -> Steps:
    """Return the bytes of values held over time; of long runs the most in each step.

    A value is held from the end of the task that made it to the end of the last that waited for that task and ran; to
    the end of the run where there is none.
    """
    last, ended = np.full(len(table), -np.inf), np.full(len(table), -np.inf)
    ended[bars.task] = bars.right
    np.maximum.at(last, table.sources, ended[table.targets])
    last[np.isneginf(last)] = end
    good = (Status.COMPLETED, Status.COMPENSATED)
    made = bars.task[np.isin(table.status_of[bars.task], good) & (table.bytes[bars.task] > 0)]
    left = np.minimum(ended[made], end)
    right = np.maximum(last[made], left)
    return _over_time(left, right, table.bytes[made].astype(np.float64), end, takes_most=True)


def heaviest_path(table: RunTable) -> tuple[list[int], float]:
    """Return the tasks of the critical path that ran, in order, and the sum of their durations."""
    graph = Adjacency.from_edges(len(table), table.sources, table.targets)
    path, seconds = critical_path(graph, np.nan_to_num(table.seconds, nan=0.0))
    return [task for task in path if np.isfinite(table.seconds[task])], seconds


def callables_by_work(table: RunTable, bars: Bars) -> Ints:
    """Return the callables that ran, the one that took most time first."""
    work = np.bincount(table.callable_of[bars.task], bars.right - bars.left, len(table.callables))
    n_tasks = np.bincount(table.callable_of[bars.task], minlength=len(table.callables))
    order = np.lexsort((np.arange(len(work)), -work))
    return order[n_tasks[order] > 0].astype(np.int32)


def smallest(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return integers in the smallest type that holds them and that a browser has arrays of; others as float64."""
    for kind in (np.uint8, np.uint16, np.int32, np.uint32):
        info = np.iinfo(kind)
        if not len(values) or (values.min() >= info.min and values.max() <= info.max):
            return values.astype(kind)
    return values.astype(np.float64)


def _over_time(left: Floats, right: Floats, weight: Floats, end: float, *, takes_most: bool) -> Steps:
    times = np.concatenate([left, right])
    order = np.argsort(times, kind="stable")
    times = np.concatenate([[0.0], times[order], [max(end, 0.0)]])
    level = np.concatenate([[0.0], np.cumsum(np.concatenate([weight, -weight])[order])])
    level = np.maximum(np.round(level, 6), 0.0)
    keeps = np.diff(times) > 0
    if int(keeps.sum()) <= MOST_STEPS:
        starts = np.flatnonzero(keeps)
        return Steps(np.append(times[starts], times[-1]), level[starts], 0.0)
    edges = np.linspace(0.0, times[-1], MOST_STEPS + 1)
    step = float(edges[1])
    if takes_most:
        return Steps(edges, _most_within(times, level, edges), step)
    area = np.concatenate([[0.0], np.cumsum(level * np.diff(times))])
    return Steps(edges, np.diff(np.interp(edges, times, area)) / step, step)


def _most_within(times: Floats, level: Floats, edges: Floats) -> Floats:
    """Return the highest level within each step: the one that it begins at, or one that begins within it."""
    at_start = level[np.clip(np.searchsorted(times, edges[:-1], side="right") - 1, 0, len(level) - 1)]
    place = np.clip(np.searchsorted(edges, times[:-1], side="right") - 1, 0, len(edges) - 2)
    lasts = np.diff(times) > 0
    np.maximum.at(at_start, place[lasts], level[lasts])
    return at_start


def _groups(ordered: Ints) -> tuple[Ints, NDArray[np.intp]]:
    """Return the distinct ones of ascending numbers, and where each begins."""
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(ordered) else np.zeros(0, np.intp)
    return ordered[starts], starts


def _shortened(stems: list[str]) -> list[str]:
    """Cut long texts in the middle where all together would be too much."""
    if sum(map(len, stems)) <= _MOST_TEXT:
        return stems
    most = max(_MOST_TEXT // len(stems), _FEWEST_CHARACTERS)
    return [stem if len(stem) <= most else f"{stem[: most // 2]}…{stem[-(most - most // 2 - 1) :]}" for stem in stems]
