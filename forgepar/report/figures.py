"""What is shown of a run that goes: counts, open layers, throughput, time left; from a look at it, or from a table."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgepar.columns import distinct_places
from forgepar.displays import Look, RunningTask
from forgepar.plan import IntArray
from forgepar.runstate import Status
from forgepar.runtable import RunTable

MOST_LAYERS = 3  # open ones that are shown with a bar each; an eager run may have hundreds
_WINDOW_SECONDS = 10.0  # throughput is that of the last so many
_NEW_SHARE = 0.3  # of a new estimate of the time left in the one that is shown
_TRIED = [Status.COMPLETED, Status.FAILED, Status.COMPENSATED]
_OPEN = [Status.PENDING, Status.RUNNING]
# At least this much of the time that a run should have taken so far, so that one that was just begun is not taken for
# a hundred times slower than its tasks.
_LEAST_PAST_SECONDS = 1e-3

Floats = NDArray[np.float64]


class LayerFigures(NamedTuple):
    """How far a layer is."""

    layer: int
    n_done: int
    n_tasks: int


@dataclass(frozen=True, slots=True)
class Figures:
    """How a run stands.

    Attributes:
        workflow: the workflow's name.
        n_tasks: how many there are by now.
        n_done: those that are settled, whatever became of them.
        counts: how many tasks have each status that occurs.
        n_layers: how many there are by now.
        n_layers_done: those whose tasks are all settled.
        layers: the first few that are begun and not done.
        n_open: how many are begun and not done.
        rate: tasks a second that ran to an end; nan while none did.
        seconds_left: until all tasks are done, as far as can be told; nan where it cannot.
        elapsed_seconds: how long the run has taken so far.
        n_workers: how many there are.
        running: the tasks that workers are at, the longest first.
        pids: the workers' processes, by slot; 0 where there is none.
        bytes_held: what large values take in shared memory, bytes.
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
        """How much of the run is settled, 0 to 1."""
        return self.n_done / self.n_tasks if self.n_tasks else 1.0

    @property
    def n_failed(self) -> int:
        """How many tasks failed for good."""
        return self.counts.get("failed", 0)


class Groups:
    """Tasks of the same layer and template, counted together: every figure of a run is made of these counts.

    Args:
        layer: (n,) that of each task.
        template: (n,) that of each task.

    Attributes:
        layer: (n_groups,) that of each group.
        template: (n_groups,) that of each group.
    """

    def __init__(self, layer: IntArray, template: IntArray) -> None:
        n_templates = int(template.max(initial=0)) + 1
        keys, places = distinct_places(layer.astype(np.int64) * n_templates + template)
        self.layer, self.template = keys // n_templates, keys % n_templates
        self._rows = places.astype(np.int64) * len(Status)

    def __len__(self) -> int:
        return len(self._rows)

    def counts(self, status: NDArray[np.int8]) -> NDArray[np.int64]:
        """Return (n_groups, n_statuses): how many tasks of each group have each status."""
        n_groups, n_statuses = len(self.layer), len(Status)
        return np.bincount(self._rows + status, minlength=n_groups * n_statuses).reshape(n_groups, n_statuses)


class Meter:
    """Makes figures of a run, one moment after the other."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._first_start = math.nan
        self._left: tuple[float, float] | None = None  # when it was told, and what
        self._groups: Groups | None = None

    def of_look(self, look: Look) -> Figures:
        """Return how a run stands at this moment."""
        elapsed, n_workers = look.now - look.began, len(look.pids)
        counts = self._grouped(look.layer, look.template).counts(look.status)
        since_start = look.now - self._first(look.start)
        running = tuple(sorted((task for _, task in look.running), key=lambda task: -task.seconds))
        ahead = [task.seconds for task in running]
        seconds = _known(_with_running(look))[np.array(look.callable_of)]
        figures = self._figures(look.workflow, counts, elapsed, seconds, n_workers, since_start, ahead, look.by_layers)
        return replace(figures, running=running, pids=look.pids, bytes_held=look.bytes_held)

    @staticmethod
    def of_end(look: Look) -> Figures:
        """Return how a run ended: its counts alone, which cost a hundredth of all the rest."""
        n_tasks, numbers = len(look.status), np.bincount(look.status, minlength=len(Status)).tolist()
        counts = {kind.name.lower(): n for kind, n in zip(Status, numbers, strict=True) if n}
        n_done, n_layers = n_tasks - sum(numbers[kind] for kind in _OPEN), int(look.layer.max(initial=-1)) + 1
        elapsed = look.now - look.began
        return Figures(look.workflow, n_tasks, n_done, counts, n_layers, n_layers, (), 0, math.nan, 0.0, elapsed)

    def of_table(self, table: RunTable) -> Figures:
        """Return how a run stands by what is known of it from outside, as by its store."""
        counts = self._grouped(table.layer, table.callable_of).counts(table.status_of)
        ran = np.isfinite(table.seconds)
        n = np.bincount(table.callable_of[ran], minlength=len(table.callables))
        total = np.bincount(table.callable_of[ran], table.seconds[ran], minlength=len(table.callables))
        seconds = _known(np.divide(total, n, out=np.full(len(n), math.nan), where=n > 0))
        elapsed, n_workers = table.wall_seconds, table.n_workers
        since_start = elapsed - (float(table.start[ran].min()) if ran.any() else math.nan)
        by_layers = table.schedule == "layers"
        return self._figures(table.workflow, counts, elapsed, seconds, n_workers, since_start, (), by_layers)

    def _grouped(self, layer: IntArray, template: IntArray) -> Groups:
        if self._groups is None or len(self._groups) != len(layer):
            self._groups = Groups(layer, template)
        return self._groups

    def _first(self, start: Floats) -> float:
        if math.isnan(self._first_start):
            known = start[np.isfinite(start)]
            self._first_start = float(known.min()) if len(known) else math.nan
        return self._first_start

    def _figures(
        self,
        workflow: str,
        counts: NDArray[np.int64],
        elapsed: float,
        seconds: Floats,
        n_workers: int,
        since_start: float,
        ahead: Sequence[float],
        by_layers: bool,
    ) -> Figures:
        assert self._groups is not None
        groups, numbers = self._groups, counts.sum(axis=0).tolist()
        layer = groups.layer if by_layers else np.zeros_like(groups.layer)
        done, left = counts[:, _TRIED].sum(axis=1), counts[:, _OPEN].sum(axis=1)
        to_come = seconds_left(layer, seconds[groups.template], done, left, n_workers, since_start, ahead)
        n_layers, n_layers_done, layers = _layers(groups.layer, counts)
        return Figures(
            workflow,
            sum(numbers),
            sum(numbers) - int(left.sum()),
            {kind.name.lower(): n for kind, n in zip(Status, numbers, strict=True) if n},
            n_layers,
            n_layers_done,
            tuple(layers[:MOST_LAYERS]),
            len(layers),
            self._rate(elapsed, int(done.sum())),
            self._smoothed(elapsed, to_come),
            elapsed,
            n_workers,
        )

    def _rate(self, elapsed: float, n: int) -> float:
        """Return how many tasks were done a second, of late."""
        seen = self._seen
        if n == 0:
            seen[0] = (elapsed, 0)  # so that the start of the workers does not count
            return math.nan
        seen.append((elapsed, n))
        while len(seen) > 2 and seen[1][0] <= elapsed - _WINDOW_SECONDS:
            seen.popleft()
        then, before = seen[0]
        return max(0, n - before) / (elapsed - then) if elapsed > then else math.nan

    def _smoothed(self, elapsed: float, left: float) -> float:
        self._left = (elapsed, smoothed(self._left, elapsed, left))
        return self._left[1]


def smoothed(before: tuple[float, float] | None, now: float, left: float) -> float:
    """Return the time left to show: what was shown before, less what went by, moved towards a new estimate.

    Example:
        >>> smoothed((10.0, 60.0), 12.0, 48.0)
        55.0
    """
    if before is None or math.isnan(before[1]) or math.isnan(left) or left == 0:
        return left
    expected = max(0.0, before[1] - (now - before[0]))
    return expected + _NEW_SHARE * (left - expected)


def seconds_left(
    layer: NDArray[np.int64],
    seconds: Floats,
    done: NDArray[np.int64],
    left: NDArray[np.int64],
    n_workers: int,
    elapsed: float,
    ahead: Sequence[float],
) -> float:
    """Estimate how long the tasks that are left will take.

    Tasks should take, layer by layer, as many rounds as each worker gets tasks of it. What is left is taken to be as
    much slower than that as what is done was: by what it costs to hand tasks out, by workers that wait.

    Args:
        layer: (n_groups,) the layer of each group of tasks; one for all where layers do not wait for each other.
        seconds: (n_groups,) what one of its tasks is expected to take.
        done: (n_groups,) how many of its tasks ran to an end.
        left: (n_groups,) how many have not.
        n_workers: how many share the tasks.
        elapsed: seconds since the first task began.
        ahead: for how long each of the tasks that run has.

    Returns:
        Seconds, nan while nothing is known.
    """
    if not left.any():
        return 0.0
    if not done.any() or not math.isfinite(elapsed) or n_workers < 1:
        return math.nan
    begun = sum(ahead) / n_workers
    past = _rounds(layer, seconds, done, n_workers) + begun
    to_come = _rounds(layer, seconds, left, n_workers)
    slower = max(elapsed, 0.0) / max(past, _LEAST_PAST_SECONDS)
    return max(to_come - begun, to_come / 2) * slower if begun else to_come * slower


def _rounds(layer: NDArray[np.int64], seconds: Floats, n: NDArray[np.int64], n_workers: int) -> float:
    """Return what tasks take if every worker gets as many of a layer as every other."""
    n_of = np.bincount(layer, n)
    total = np.bincount(layer, n * seconds)
    has_any = n_of > 0
    rounds = np.ceil(n_of[has_any] / n_workers)
    return float((total[has_any] / n_of[has_any] * rounds).sum())


def _with_running(look: Look) -> list[float]:
    """Return what tasks of each callable take; where none is done, what those that run show that they take at least."""
    seconds = list(look.seconds)
    for number, task in look.running:
        called = look.callable_of[int(look.template[number])]
        if not math.isfinite(look.seconds[called]):
            shown = task.seconds / task.fraction if task.fraction > 0 else task.seconds
            seconds[called] = max(shown, seconds[called]) if math.isfinite(seconds[called]) else shown
    return seconds


def _known(seconds: Sequence[float] | Floats) -> Floats:
    """Take what nothing is known of to be as the others are."""
    means = np.asarray(seconds, np.float64)
    is_known = np.isfinite(means)
    typical = means[is_known].mean() if is_known.any() else math.nan
    return np.where(is_known, means, typical)


def _layers(layer: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[int, int, list[LayerFigures]]:
    """Return how many layers there are, how many are done, and those that are begun and not done."""
    n_tasks = np.bincount(layer, counts.sum(axis=1))
    n_pending = np.bincount(layer, counts[:, Status.PENDING])
    n_done = n_tasks - np.bincount(layer, counts[:, _OPEN].sum(axis=1))
    is_open = (n_pending < n_tasks) & (n_done < n_tasks)
    figures = [LayerFigures(i, int(n_done[i]), int(n_tasks[i])) for i in np.flatnonzero(is_open).tolist()]
    return len(n_tasks), int((n_done == n_tasks).sum()), figures
