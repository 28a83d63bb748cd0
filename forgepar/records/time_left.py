"""The estimated time left of a run, from its counts, the durations of its tasks and the clock.

The displays and `RunSnapshot.seconds_left` take it from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forgepar.records.display import RunView
from forgepar.records.table import RunTable
from forgepar.scheduling.run_state import Status
from forgepar.workflow.plan import IntArray
from forgepar.workflow.taskset import distinct_places

TRIED = [Status.COMPLETED, Status.FAILED, Status.COMPENSATED]
OPEN = [Status.PENDING, Status.RUNNING]
# The lower bound of the time that the finished tasks should have taken. Without it, a run that has just begun would
# seem a hundred times slower than its tasks.
_LEAST_PAST_SECONDS = 1e-3

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Groups:
    """Tasks of the same layer and template, counted together.

    Args:
        layer: (n,) the layer of each task.
        template: (n,) the template of each task.

    Attributes:
        layer: (n_groups,) the layer of each group.
        template: (n_groups,) the template of each group.
    """

    def __init__(self, layer: IntArray, template: IntArray) -> None:
        n_templates = int(template.max(initial=0)) + 1
        keys, places = distinct_places(layer.astype(np.int64) * n_templates + template)
        self.layer, self.template = keys // n_templates, keys % n_templates
        self._rows = places.astype(np.int64) * len(Status)

    def __len__(self) -> int:
        return len(self._rows)

    def counts(self, status: NDArray[np.int8]) -> Counts:
        """Return (n_groups, n_statuses): how many tasks of each group have each status."""
        n_groups, n_statuses = len(self.layer), len(Status)
        return np.bincount(self._rows + status, minlength=n_groups * n_statuses).reshape(n_groups, n_statuses)


def of_view(view: RunView, groups: Groups, counts: Counts, began: float) -> float:
    """Estimate the time left of a run of this process.

    Args:
        view: the run.
        groups: its tasks.
        counts: what `Groups.counts` returns for them.
        began: when the first task began; see `first_start`.

    Returns:
        Seconds; nan if it is not known.
    """
    seconds = _filled(_with_running(view))[np.array(view.callable_of)]
    running = [task.seconds for _, task in view.running]
    return _of_counts(groups, counts, seconds, len(view.pids), view.now - began, running, view.by_layers)


def of_table(table: RunTable, groups: Groups, counts: Counts) -> float:
    """Estimate the time left of a run of another process, from its table; `of_view` has the arguments."""
    ran = np.isfinite(table.seconds)
    n = np.bincount(table.callable_of[ran], minlength=len(table.callables))
    total = np.bincount(table.callable_of[ran], table.seconds[ran], minlength=len(table.callables))
    seconds = _filled(np.divide(total, n, out=np.full(len(n), math.nan), where=n > 0))
    elapsed = table.wall_seconds - first_start(table.start[ran])
    return _of_counts(groups, counts, seconds, table.n_workers, elapsed, (), table.schedule == "layers")


def first_start(start: Floats) -> float:
    """Return the earliest start; nan if no task has started."""
    known = start[np.isfinite(start)]
    return float(known.min()) if len(known) else math.nan


def _of_counts(
    groups: Groups,
    counts: Counts,
    seconds: Floats,
    n_workers: int,
    elapsed: float,
    running: Sequence[float],
    by_layers: bool,
) -> float:
    layer = groups.layer if by_layers else np.zeros_like(groups.layer)
    done, left = counts[:, TRIED].sum(axis=1), counts[:, OPEN].sum(axis=1)
    return seconds_left(layer, seconds[groups.template], done, left, n_workers, elapsed, running)


def seconds_left(
    layer: NDArray[np.int64],
    seconds: Floats,
    done: NDArray[np.int64],
    left: NDArray[np.int64],
    n_workers: int,
    elapsed: float,
    running: Sequence[float],
) -> float:
    """Estimate how long the remaining tasks take.

    The tasks of a layer take as many rounds as each worker gets tasks of it. The estimate multiplies the rounds that
    remain by the ratio of measured to expected time so far, which includes overhead and idle workers.

    Args:
        layer: (n_groups,) the layer of each group of tasks; the same for all if layers do not wait for each other.
        seconds: (n_groups,) the expected duration of one task.
        done: (n_groups,) how many tasks have ended.
        left: (n_groups,) how many tasks remain.
        n_workers: the number of workers.
        elapsed: seconds since the first task began.
        running: for how long each running task has run, seconds.

    Returns:
        Seconds; nan if no task has ended yet.
    """
    if not left.any():
        return 0.0
    if not done.any() or not math.isfinite(elapsed) or n_workers < 1:
        return math.nan
    begun = sum(running) / n_workers
    past = _rounds(layer, seconds, done, n_workers) + begun
    to_come = _rounds(layer, seconds, left, n_workers)
    slower = max(elapsed, 0.0) / max(past, _LEAST_PAST_SECONDS)
    return max(to_come - begun, to_come / 2) * slower if begun else to_come * slower


def _rounds(layer: NDArray[np.int64], seconds: Floats, n: NDArray[np.int64], n_workers: int) -> float:
    """Return what tasks take if each layer is divided evenly among the workers."""
    n_of = np.bincount(layer, n)
    total = np.bincount(layer, n * seconds)
    has_any = n_of > 0
    rounds = np.ceil(n_of[has_any] / n_workers)
    return float((total[has_any] / n_of[has_any] * rounds).sum())


def _with_running(view: RunView) -> list[float]:
    """Return the mean duration by callable. Where no task has ended, take the lower bound that running tasks give."""
    seconds = list(view.seconds)
    for number, task in view.running:
        called = view.callable_of[int(view.template[number])]
        if not math.isfinite(view.seconds[called]):
            shown = task.seconds / task.fraction if task.fraction > 0 else task.seconds
            seconds[called] = max(shown, seconds[called]) if math.isfinite(seconds[called]) else shown
    return seconds


def _filled(seconds: Sequence[float] | Floats) -> Floats:
    """Replace each unknown duration with the mean of the known ones."""
    means = np.asarray(seconds, np.float64)
    is_known = np.isfinite(means)
    typical = means[is_known].mean() if is_known.any() else math.nan
    return np.where(is_known, means, typical)
