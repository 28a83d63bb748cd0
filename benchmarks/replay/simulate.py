"""What a perfect engine would take: list scheduling of tasks of known durations, without any cost of its own.

Pure functions of numbers. Durations are in any unit, results in the same. Both are Graham's list scheduling (R. L.
Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 1969): a worker that is free takes the first
task of a list that may run. They differ in when a task may run, and in what orders the list.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


def barrier_ideal(durations: Sequence[float], layers: Iterable[Iterable[int]], workers: int) -> float:
    """Return the makespan with a barrier after each layer: the sum of the layers' own.

    Args:
        durations: of each task.
        layers: the tasks of each layer, in the order in which they are handed out; each goes to the worker that is
            free first.
        workers: how many there are.
    """
    return sum(_layer_makespan([durations[task] for task in layer], workers) for layer in layers)


def greedy(durations: Sequence[float], edges: Iterable[tuple[int, int]], workers: int) -> float:
    """Return the makespan without barriers, where the ready task with the longest path behind it goes first.

    A path's length is the sum of its tasks' durations, the ready task's own included; among equals the lowest number
    goes first.

    Args:
        durations: of each task.
        edges: pairs (task, one that waits for it); a pair may come twice.
        workers: how many there are.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    n_tasks = len(durations)
    after, waits = _graph(n_tasks, edges)
    remaining = longest_remaining(durations, after, waits)
    ready = [(-remaining[task], task) for task in range(n_tasks) if not waits[task]]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []  # by when they end
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, task = heapq.heappop(ready)
            heapq.heappush(running, (now + durations[task], task))
        now, done = heapq.heappop(running)
        for task in after[done]:
            waits[task] -= 1
            if not waits[task]:
                heapq.heappush(ready, (-remaining[task], task))
    return now


def longest_remaining(durations: Sequence[float], after: Sequence[Sequence[int]], waits: Sequence[int]) -> list[float]:
    """Return for each task the length of the longest path from its start to the end.

    Args:
        durations: of each task.
        after: for each task those that wait for it.
        waits: for each task how many it waits for.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    remaining = list(durations)
    for task in reversed(topological_order(after, waits)):
        remaining[task] += max((remaining[later] for later in after[task]), default=0.0)
    return remaining


def layers_of(n_tasks: int, edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the tasks of each layer, ascending; a task's layer is the longest path to it, in tasks.

    Args:
        n_tasks: how many there are.
        edges: pairs (task, one that waits for it).

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    after, waits = _graph(n_tasks, edges)
    layer = [0] * n_tasks
    for task in topological_order(after, waits):
        for later in after[task]:
            layer[later] = max(layer[later], layer[task] + 1)
    found: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for task, at in enumerate(layer):
        found[at].append(task)
    return found


def topological_order(after: Sequence[Sequence[int]], waits: Sequence[int]) -> list[int]:
    """Return all tasks, each behind those it waits for.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    left = list(waits)
    order = [task for task, n in enumerate(left) if not n]
    for task in order:  # grows as it goes
        for later in after[task]:
            left[later] -= 1
            if not left[later]:
                order.append(later)
    if len(order) < len(left):
        raise ValueError(f"{len(left) - len(order)} tasks wait for each other in a circle, or for one that does.")
    return order


def _graph(n_tasks: int, edges: Iterable[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
    """Return for each task those that wait for it, and how many it waits for."""
    after: list[list[int]] = [[] for _ in range(n_tasks)]
    waits = [0] * n_tasks
    for task, later in set(edges):
        after[task].append(later)
        waits[later] += 1
    return after, waits


def _layer_makespan(durations: Sequence[float], workers: int) -> float:
    free = [0.0] * workers  # when each worker is
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)
