"""Expected wall times of a run with other numbers of workers and both schedules, from its durations and delays.

It uses only columns, no plan and no state machine, so that 100,000 tasks on eight numbers of workers take seconds:

RunTable ──> tasks that ran, their order and dependencies ──┐
    └──────> delays that the engine added between tasks ────┴──> layers, eager ──> plan_table ──> plan_text

Each worker is assumed to have its own processor, as fast as those of the run. A task that did not run takes no time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar._validate import check_count, shown
from forgepar.graph import Adjacency, longest_remaining
from forgepar.records.table import RunTable

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_WORKERS = 1_000_000
_JOINS = -1  # in place of a task: a worker becomes available
_WORKERS_SYNTAX = "Give a number, numbers with commas, or a range such as 1..128."

Schedule = Literal["layers", "eager"]
Floats = NDArray[np.float64]


class PlanRow(NamedTuple):
    """Expected wall times with a number of workers, in seconds: with barriers between layers, and without."""

    workers: int
    layered_seconds: float
    eager_seconds: float


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays that the engine adds to the durations of tasks, in seconds.

    Attributes:
        head: from the start of the run to the start of its first task.
        joining: from the start of the first task to the start of each further worker, ascending. More workers than
            these start with the last.
        following: before a task that was ready when its worker finished the previous one.
        woken: before a task that its worker waited for.
        tail: from the end of the last task to the end of the run.
    """

    head: float = 0.0
    following: float = 0.0
    woken: float = 0.0
    tail: float = 0.0
    joining: tuple[float, ...] = ()

    @classmethod
    def measured(cls, table: RunTable) -> Delays:
        """Measure the delays of a run."""
        ran = _ran(table)
        if not len(ran):
            return cls(head=table.wall_seconds)
        start, end = table.start, table.start + table.seconds
        first, last = float(start[ran].min()), float(end[ran].max())
        ready = _ready_by_layer(table) if table.schedule == "layers" else _ready_by_edges(table)
        order = ran[np.lexsort((start[ran], table.worker[ran]))]
        before = np.full(len(order), -np.inf)
        same = table.worker[order][1:] == table.worker[order][:-1]
        before[1:][same] = end[order][:-1][same]
        delays = start[order] - np.maximum(before, ready[order])
        # It is not known when a retried task, or the first task of a worker, could have begun.
        opening = order[np.isneginf(before) & np.isneginf(ready[order])]
        known = np.isfinite(delays) & (table.attempt[order] <= 1) & (table.worker[order] >= 0)
        is_woken = ready[order] > before
        following, woken = (_mean(delays[known & chosen]) for chosen in (~is_woken, is_woken))
        joining = tuple(np.sort(start[opening] - first)[1:].tolist())
        return cls(max(first, 0.0), following, woken, max(table.wall_seconds - last, 0.0), joining)

    def joined(self, workers: int) -> list[float]:
        """Return when each worker can begin, the first at 0."""
        known = [0.0, *self.joining][:workers]
        return known + known[-1:] * (workers - len(known))


class Forecast:
    """Expected wall times of the tasks of a run on any number of workers.

    Each free worker takes the next ready task (list scheduling, R. L. Graham, 1966). With layers, this is the next task
    of the layer in the order of the run; without, the one with the longest remaining path.

    Args:
        table: the run.
        delays: the delays of the engine; None: as measured in this run.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> _ = wf.map(abs, range(3))
        >>> forecast = Forecast(wf.run(backend="inline").table())
        >>> forecast.seconds(1, "layers") >= forecast.seconds(3, "layers")
        True
    """

    def __init__(self, table: RunTable, delays: Delays | None = None) -> None:
        self._table = table
        self.delays = Delays.measured(table) if delays is None else delays
        self._ran = _ran(table)
        self._seconds = np.zeros(len(table))
        self._seconds[self._ran] = table.seconds[self._ran]
        for failed in table.failures:
            if failed.attempt < table.attempt[failed.task] and np.isfinite(failed.seconds):
                self._seconds[failed.task] += failed.seconds
        # The number of workers above which an eager run is not shorter, and its time.
        self._enough: tuple[int, float] | None = None

    def seconds(self, workers: int, schedule: Schedule) -> float:
        """Return the wall time in seconds.

        Raises:
            ValueError: ``workers`` is below 1.
        """
        check_count("workers", workers)
        spent = self._layered(workers) if schedule == "layers" else self._eager(workers)
        return self.delays.head + spent + self.delays.tail

    def _layered(self, workers: int) -> float:
        seconds, starts = self._by_layer
        if not len(seconds):
            return 0.0
        sizes = np.diff(np.append(starts, len(seconds)))
        woken, following = self.delays.woken, self.delays.following
        walls = np.maximum.reduceat(seconds, starts)
        for layer in {0, *np.flatnonzero(sizes > workers).tolist()}:
            tasks = seconds[starts[layer] : starts[layer] + sizes[layer]] + following
            free = self.delays.joined(workers) if layer == 0 else [0.0] * workers
            walls[layer] = _makespan(tasks, free) - following
        return float(walls.sum()) + woken * (len(starts) - 1)

    @cached_property
    def _by_layer(self) -> tuple[Floats, NDArray[np.intp]]:
        """The durations in the order of the layers and of submission, and the index where each layer begins."""
        table, ran = self._table, self._ran
        # A run by layers submitted them in the order of their start. Another one is assumed to submit by callable.
        within = table.start[ran] if table.schedule == "layers" else table.callable_of[ran]
        order = ran[np.lexsort((ran, within, table.layer[ran]))]
        changes = np.flatnonzero(np.diff(table.layer[order])) + 1
        return self._seconds[order], np.concatenate([[0], changes]).astype(np.intp)[: len(order)]

    def _eager(self, workers: int) -> float:
        if self._enough is not None and workers >= self._enough[0]:
            return self._enough[1]
        spent, most = self._list_schedule(workers)
        if most < workers:
            self._enough = most, spent
        return spent

    def _list_schedule(self, workers: int) -> tuple[float, int]:
        """Return the wall time without barriers, and the largest number of workers that were busy at once."""
        graph, seconds, ran, waits = self._graph_lists
        starts, after, priority = graph
        waits, ready_at = waits.copy(), [0.0] * len(waits)
        following, woken = self.delays.following, self.delays.woken
        settled = [task for task, n in enumerate(waits) if not n and not ran[task]]
        ready = [(priority[task], task) for task, n in enumerate(waits) if not n and ran[task]]
        heapq.heapify(ready)
        running = [(at, _JOINS) for at in self.delays.joined(workers) if at > 0]
        now, most, n_away, has_begun = 0.0, 0, len(running), False
        while True:
            while settled:
                done = settled.pop()
                for task in after[starts[done] : starts[done + 1]]:
                    waits[task] -= 1
                    if not waits[task] and ran[task]:
                        ready_at[task] = now
                        heapq.heappush(ready, (priority[task], task))
                    elif not waits[task]:
                        settled.append(task)
            while ready and len(running) < workers:
                task = heapq.heappop(ready)[1]
                delay = 0.0 if not has_begun else woken if ready_at[task] == now else following
                heapq.heappush(running, (now + delay + seconds[task], task))
            most = max(most, len(running) - n_away)
            if len(running) == n_away and not ready:
                return now, most
            now, task = heapq.heappop(running)
            has_begun = task != _JOINS
            if has_begun:
                settled.append(task)
            else:
                n_away -= 1

    @cached_property
    def _graph_lists(self) -> tuple[tuple[list[int], list[int], list[float]], list[float], list[bool], list[int]]:
        """The graph as lists: reading single items takes a third of the time that arrays take."""
        table = self._table
        graph = Adjacency.from_edges(len(table), table.sources, table.targets)
        priority = (-longest_remaining(graph, self._seconds)).tolist()
        ran = np.zeros(len(table), np.bool_)
        ran[self._ran] = True
        lists = graph.indptr.tolist(), graph.indices.tolist(), priority
        return lists, self._seconds.tolist(), ran.tolist(), graph.in_degrees().tolist()


def plan_table(table: RunTable, workers: Sequence[int] = WORKERS) -> list[PlanRow]:
    """Return the expected wall time of a run for each number of workers, by layers and eager.

    Args:
        table: the run, with its measured durations and delays.
        workers: the number of workers of each row.

    Raises:
        ValueError: a number of workers is below 1.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> _ = wf.map(abs, range(3))
        >>> [row.workers for row in plan_table(wf.run(backend="inline").table(), parse_workers("1..4"))]
        [1, 2, 4]
    """
    forecast = Forecast(table)
    return [PlanRow(n, forecast.seconds(n, "layers"), forecast.seconds(n, "eager")) for n in workers]


def plan_text(table: RunTable, rows: Sequence[PlanRow]) -> str:
    """Return the rows of `plan_table` as text, below a line with the measured time."""
    measured = f"measured {table.wall_seconds:.3g} s on {table.n_workers} workers, schedule {table.schedule!r}"
    lines = [
        f"workflow {table.workflow!r}: {measured}, {len(_ran(table))} of {len(table)} tasks ran",
        f"{'workers':>7} {'by layers':>12} {'eager':>12} {'barriers cost':>14}",
    ]
    for row in rows:
        ratio = row.layered_seconds / row.eager_seconds if row.eager_seconds else 1.0
        lines.append(f"{row.workers:>7} {row.layered_seconds:>10.3f} s {row.eager_seconds:>10.3f} s {ratio:>13.2f}x")
    return "\n".join(lines)


def parse_workers(text: str) -> list[int]:
    """Parse numbers of workers: "4"; "1,2,8"; or "1..128", which doubles from the first to the last number.

    Raises:
        ValueError: the text is none of these, or a number is below 1.

    Example:
        >>> parse_workers("1..12"), parse_workers("3,1"), parse_workers("4")
        ([1, 2, 4, 8, 12], [3, 1], [4])
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = _count(first, text)
        high = _count(last, text) if dots else low
        if high < low:
            raise ValueError(f"workers must be an ascending range, got {shown(text)}. {_WORKERS_SYNTAX}")
        while low < high:
            found.append(low)
            low *= 2
        found.append(high)
    return list(dict.fromkeys(found))


def _count(text: str, whole: str) -> int:
    digits = text.strip()
    is_short = len(digits) <= len(str(_MOST_WORKERS))  # int() refuses very long numbers
    if not (digits.isascii() and digits.isdigit() and is_short and 1 <= int(digits) <= _MOST_WORKERS):
        raise ValueError(
            f"workers must be numbers from 1 to {_MOST_WORKERS}, got {shown(text)} in {shown(whole)}. {_WORKERS_SYNTAX}"
        )
    return int(digits)


def _ran(table: RunTable) -> NDArray[np.int32]:
    ran = table.ran()
    return ran[np.isfinite(table.start[ran])]


def _ready_by_layer(table: RunTable) -> Floats:
    """Return when the layers before the layer of each task ended; -inf if there was none."""
    ended = np.full(int(table.layer.max(initial=-1)) + 2, -np.inf)
    ran = _ran(table)
    np.maximum.at(ended, table.layer[ran] + 1, table.start[ran] + table.seconds[ran])
    ready: Floats = np.maximum.accumulate(ended)[table.layer]
    return ready


def _ready_by_edges(table: RunTable) -> Floats:
    """Return when the dependencies of each task ended; -inf if none of them ran."""
    ready = np.full(len(table), -np.inf)
    end = (table.start + table.seconds)[table.sources]
    known = np.isfinite(end)
    np.maximum.at(ready, table.targets[known], end[known])
    return ready


def _mean(delays: Floats) -> float:
    return float(np.maximum(delays, 0.0).mean()) if len(delays) else 0.0


def _makespan(seconds: Floats, free: list[float]) -> float:
    """Return when the last task ends if each one, in this order, starts on the worker that is free first.

    Args:
        seconds: the duration of each task.
        free: when each worker becomes free, ascending; modified in place.
    """
    if len(free) == 1:
        return free[0] + float(seconds.sum())
    del free[len(seconds) :]  # these get no task
    replace = heapq.heapreplace
    for duration in seconds.tolist():
        replace(free, free[0] + duration)
    return max(free)
