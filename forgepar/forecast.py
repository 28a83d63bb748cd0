"""What a run would take with other workers and the other schedule, by the durations and delays that it measured.

Columns alone, no plan and no state machine, so that a hundred thousand tasks on eight numbers of workers take seconds:

RunTable ──> what ran, in which order, behind what ──┐
    └──────> what the engine added between tasks ────┴──> layered, eager ──> plan_table ──> plan_text

Workers are taken to have a processor each, as fast as those of the run; a task that did not run takes no time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.graph import Adjacency, longest_remaining
from forgepar.runtable import RunTable

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_WORKERS = 1_000_000
_JOINS = -1  # in place of a task: a worker that begins to be there
_MEND = "Give a number, numbers with commas, or a range such as 1..128."

Schedule = Literal["layers", "eager"]
Floats = NDArray[np.float64]


class PlanRow(NamedTuple):
    """What a run would take on so many workers, seconds, with barriers between layers and without."""

    workers: int
    layered_seconds: float
    eager_seconds: float


@dataclass(frozen=True, slots=True)
class Delays:
    """What the engine adds to the durations of tasks, seconds.

    Attributes:
        head: from the start of the run to that of its first task.
        joining: from there to when each further worker began, ascending; more workers than these come with the last.
        following: before a task that was ready when its worker was done with the last one.
        woken: before a task for which its worker waited.
        tail: from the end of the last task to that of the run.
    """

    head: float = 0.0
    following: float = 0.0
    woken: float = 0.0
    tail: float = 0.0
    joining: tuple[float, ...] = ()

    @classmethod
    def measured(cls, table: RunTable) -> Delays:
        """Measure them in a run."""
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
        # Of a task that was tried again, and of the first ones, it is not known when they could have begun.
        opening = order[np.isneginf(before) & np.isneginf(ready[order])]
        known = np.isfinite(delays) & (table.attempt[order] <= 1) & (table.worker[order] >= 0)
        is_woken = ready[order] > before
        following, woken = (_mean(delays[known & chosen]) for chosen in (~is_woken, is_woken))
        joining = tuple(np.sort(start[opening] - first)[1:].tolist())
        return cls(max(first, 0.0), following, woken, max(table.wall_seconds - last, 0.0), joining)

    def joined(self, workers: int) -> list[float]:
        """Return when each of so many workers can begin, the first at 0."""
        known = [0.0, *self.joining][:workers]
        return known + known[-1:] * (workers - len(known))


class Forecast:
    """The tasks of a run that ran, to be laid out on any number of workers.

    Each worker that is free takes the next ready task (list scheduling, R. L. Graham, 1966): of its layer in the order
    in which the run handed them out, or without layers the one with the longest path behind it.

    Args:
        table: the run.
        delays: what the engine adds; None: what it added in this run.

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
        self._enough: tuple[int, float] | None = None  # workers above which eager runs take no less, and what they take

    def seconds(self, workers: int, schedule: Schedule) -> float:
        """Return the wall time, seconds.

        Raises:
            ValueError: workers below 1.
        """
        if workers < 1:
            raise ValueError(f"workers={workers!r} is no number of workers. Give 1 or more.")
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
        """The seconds of what ran, layer by layer as it is handed out, and where each layer begins."""
        table, ran = self._table, self._ran
        # Of a run by layers it is known how they were handed out; else it is by callable, as they would be.
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
        """Return the wall time without barriers, and how many workers were busy at once at most."""
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
        """The graph as lists, which are read an item at a time in a third of the time that arrays take."""
        table = self._table
        graph = Adjacency.from_edges(len(table), table.sources, table.targets)
        priority = (-longest_remaining(graph, self._seconds)).tolist()
        ran = np.zeros(len(table), np.bool_)
        ran[self._ran] = True
        lists = graph.indptr.tolist(), graph.indices.tolist(), priority
        return lists, self._seconds.tolist(), ran.tolist(), graph.in_degrees().tolist()


def plan_table(table: RunTable, workers: Sequence[int] = WORKERS) -> list[PlanRow]:
    """Return what the run would take on each number of workers, by layers and eager.

    Args:
        table: the run; what it measured is what is laid out.
        workers: how many, for each row.

    Raises:
        ValueError: workers below 1.

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
    """Lay out what `plan_table` returned for a terminal, beside what was measured."""
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
    """Read numbers of workers: "4"; "1,2,8"; or "1..128": the first, twice that and so on, and the last.

    Raises:
        ValueError: it is none of these, or a number below 1.

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
            raise ValueError(f"workers {text!r} has a range whose end is below its start. {_MEND}")
        while low < high:
            found.append(low)
            low *= 2
        found.append(high)
    return list(dict.fromkeys(found))


def _count(text: str, whole: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and 1 <= int(text) <= _MOST_WORKERS):
        raise ValueError(f"workers {whole!r} has {text!r} in it, which is no number of workers. {_MEND}")
    return int(text)


def _ran(table: RunTable) -> NDArray[np.int32]:
    ran = table.ran()
    return ran[np.isfinite(table.start[ran])]


def _ready_by_layer(table: RunTable) -> Floats:
    """Return when the layers before each task's were done; -inf where there was none."""
    ended = np.full(int(table.layer.max(initial=-1)) + 2, -np.inf)
    ran = _ran(table)
    np.maximum.at(ended, table.layer[ran] + 1, table.start[ran] + table.seconds[ran])
    ready: Floats = np.maximum.accumulate(ended)[table.layer]
    return ready


def _ready_by_edges(table: RunTable) -> Floats:
    """Return when what each task waited for was done; -inf where it waited for nothing that ran."""
    ready = np.full(len(table), -np.inf)
    end = (table.start + table.seconds)[table.sources]
    known = np.isfinite(end)
    np.maximum.at(ready, table.targets[known], end[known])
    return ready


def _mean(delays: Floats) -> float:
    return float(np.maximum(delays, 0.0).mean()) if len(delays) else 0.0


def _makespan(seconds: Floats, free: list[float]) -> float:
    """Return when the last of tasks in this order is done, each begun by the worker that is free first.

    Args:
        seconds: of each task.
        free: when each worker is free, ascending; it is changed.
    """
    if len(free) == 1:
        return free[0] + float(seconds.sum())
    del free[len(seconds) :]  # those get none
    replace = heapq.heapreplace
    for duration in seconds.tolist():
        replace(free, free[0] + duration)
    return max(free)
