"""What the displays show of a run: counts, open layers, throughput and time left, of a `RunView` or a `RunTable`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.records import time_left
from forgepar.records.display import RunningTask, RunView
from forgepar.records.table import RunTable
from forgepar.records.time_left import OPEN, TRIED, Counts, Groups
from forgepar.scheduling.run_state import Status
from forgepar.workflow.plan import IntArray

MOST_LAYERS = 3  # layers that get a bar of their own; an eager run may have hundreds of open ones
_WINDOW_SECONDS = 10.0  # the throughput is measured over this time
_NEW_SHARE = 0.3  # weight of a new estimate of the time left in the one that is shown


class LayerFigures(NamedTuple):
    """The progress of a layer."""

    layer: int
    n_done: int
    n_tasks: int


@dataclass(frozen=True, slots=True)
class Figures:
    """A run at one moment.

    Attributes:
        workflow: the workflow's name.
        n_tasks: the number of tasks so far; a run may add more.
        n_done: settled tasks, whatever their status.
        counts: how many tasks have each status; statuses without a task are left out.
        n_layers: the number of layers so far.
        n_layers_done: layers whose tasks are all settled.
        layers: the first few open layers, which have begun and are not done.
        n_open: the number of open layers.
        rate: completed and failed tasks per second; nan before the first one.
        seconds_left: the estimated time left; nan if it is not known.
        elapsed_seconds: how long the run has taken so far.
        n_workers: the number of workers.
        running: the running tasks, the longest first.
        pids: the worker process of each slot; 0 if it has none.
        bytes_held: large values in shared memory, bytes.
    """

    workflow: str
    n_tasks: int
    n_done: int
    counts: dict[str, int]
    n_layers: int
    n_layers_done: int
    layers: tuple[LayerFigures, ...]
    n_open: int
    rate: float
    seconds_left: float
    elapsed_seconds: float
    n_workers: int = 0
    running: tuple[RunningTask, ...] = ()
    pids: Sequence[int] = ()
    bytes_held: int = 0

    @property
    def fraction(self) -> float:
        """The settled share of the tasks, 0 to 1."""
        return self.n_done / self.n_tasks if self.n_tasks else 1.0

    @property
    def n_failed(self) -> int:
        """The number of tasks that failed for good."""
        return self.counts.get("failed", 0)


class RunMeter:
    """Makes the figures of a run, one moment after another."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._first_start = math.nan
        self._left: tuple[float, float] | None = None  # the last estimate: when, and what
        self._groups: Groups | None = None

    def of_view(self, view: RunView) -> Figures:
        """Return the figures of a run of this process."""
        groups = self._grouped(view.layer, view.template)
        counts = groups.counts(view.status)
        if math.isnan(self._first_start):
            self._first_start = time_left.first_start(view.start)
        left = time_left.of_view(view, groups, counts, self._first_start)
        figures = self._figures(view.workflow, groups, counts, view.now - view.began, left, len(view.pids))
        running = tuple(sorted((task for _, task in view.running), key=lambda task: -task.seconds))
        return replace(figures, running=running, pids=view.pids, bytes_held=view.bytes_held)

    @staticmethod
    def of_end(view: RunView) -> Figures:
        """Return the figures of a run that has ended: its counts only, which cost a hundredth of all figures."""
        n_tasks, numbers = len(view.status), np.bincount(view.status, minlength=len(Status)).tolist()
        n_done, n_layers = n_tasks - sum(numbers[kind] for kind in OPEN), int(view.layer.max(initial=-1)) + 1
        elapsed = view.now - view.began
        return Figures(
            view.workflow, n_tasks, n_done, _by_name(numbers), n_layers, n_layers, (), 0, math.nan, 0.0, elapsed
        )

    def of_table(self, table: RunTable) -> Figures:
        """Return the figures of a run of another process, from its table."""
        groups = self._grouped(table.layer, table.callable_of)
        counts = groups.counts(table.status_of)
        left = time_left.of_table(table, groups, counts)
        return self._figures(table.workflow, groups, counts, table.wall_seconds, left, table.n_workers)

    def _grouped(self, layer: IntArray, template: IntArray) -> Groups:
        if self._groups is None or len(self._groups) != len(layer):
            self._groups = Groups(layer, template)
        return self._groups

    def _figures(
        self, workflow: str, groups: Groups, counts: Counts, elapsed: float, left: float, n_workers: int
    ) -> Figures:
        numbers = counts.sum(axis=0).tolist()
        n_layers, n_layers_done, layers = _layers(groups.layer, counts)
        self._left = (elapsed, smoothed(self._left, elapsed, left))
        return Figures(
            workflow,
            sum(numbers),
            sum(numbers) - sum(numbers[kind] for kind in OPEN),
            _by_name(numbers),
            n_layers,
            n_layers_done,
            tuple(layers[:MOST_LAYERS]),
            len(layers),
            self._rate(elapsed, sum(numbers[kind] for kind in TRIED)),
            self._left[1],
            elapsed,
            n_workers,
        )

    def _rate(self, elapsed: float, n: int) -> float:
        """Return how many tasks ended per second lately."""
        seen = self._seen
        if n == 0:
            seen[0] = (elapsed, 0)  # excludes the start of the workers
            return math.nan
        seen.append((elapsed, n))
        while len(seen) > 2 and seen[1][0] <= elapsed - _WINDOW_SECONDS:
            seen.popleft()
        then, before = seen[0]
        return max(0, n - before) / (elapsed - then) if elapsed > then else math.nan


def smoothed(before: tuple[float, float] | None, now: float, left: float) -> float:
    """Return the time left to show: the last one, less the time since then, moved towards a new estimate.

    Example:
        >>> smoothed((10.0, 60.0), 12.0, 48.0)
        55.0
    """
    if before is None or math.isnan(before[1]) or math.isnan(left) or left == 0:
        return left
    expected = max(0.0, before[1] - (now - before[0]))
    return expected + _NEW_SHARE * (left - expected)


def _by_name(numbers: Sequence[int]) -> dict[str, int]:
    return {kind.name.lower(): n for kind, n in zip(Status, numbers, strict=True) if n}


def _layers(layer: NDArray[np.int64], counts: Counts) -> tuple[int, int, list[LayerFigures]]:
    """Return the number of layers, how many are done, and the open ones."""
    n_tasks = np.bincount(layer, counts.sum(axis=1))
    n_pending = np.bincount(layer, counts[:, Status.PENDING])
    n_done = n_tasks - np.bincount(layer, counts[:, OPEN].sum(axis=1))
    is_open = (n_pending < n_tasks) & (n_done < n_tasks)
    figures = [LayerFigures(i, int(n_done[i]), int(n_tasks[i])) for i in np.flatnonzero(is_open).tolist()]
    return len(n_tasks), int((n_done == n_tasks).sum()), figures
