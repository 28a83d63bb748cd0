"""The text and the tables of a report: facts, tasks, failures. All is plain text; the template escapes it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forgepar.machine import as_text
from forgepar.records.table import FailedAttempt, LayerRow, RunTable
from forgepar.report.forecast import WORKERS, PlanRow
from forgepar.report.html.analysis import StepLine, TaskIntervals
from forgepar.scheduling.run_state import Status

MOST_PATH = 40  # tasks of the critical path that are listed
MOST_LAYERS = 200  # layers that are drawn
MOST_FAILURES = 200  # failures that are listed
_MOST_TRACEBACK = 20_000  # characters of a traceback
_MOST_TITLE = 300
_ORDER = (
    Status.COMPLETED,
    Status.CACHED,
    Status.FAILED,
    Status.SKIPPED,
    Status.CANCELLED,
    Status.COMPENSATED,
    Status.RUNNING,
    Status.PENDING,
)


class Fact(NamedTuple):
    """A figure at the top of the report: label, figure, and a note in small print."""

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class TaskLine:
    """A row of a table of tasks."""

    name: str
    callable: str
    layer: int
    seconds: str
    share: float
    share_text: str


@dataclass(frozen=True, slots=True)
class FailureLine:
    """A failed attempt: a line, and the traceback that opens below it."""

    name: str
    where: str
    error: str
    traceback: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class PlanLine:
    """A row of the forecast for other numbers of workers."""

    workers: int
    layered: str
    layered_times: str
    eager: str
    eager_times: str
    is_measured: bool


def seconds_text(seconds: float) -> str:
    """Format a time.

    Example:
        >>> [seconds_text(value) for value in (0.0000021, 0.0213, 3.14159, 75, 4000)]
        ['2.1 µs', '21.3 ms', '3.14 s', '75.0 s', '1 h 07 min']
    """
    if not np.isfinite(seconds):
        return "unknown"
    if seconds >= 3570:
        minutes = round(seconds / 60)
        return f"{minutes // 60:,} h {minutes % 60:02} min"
    if seconds >= 119.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02} s"
    if seconds == 0:
        return "0 s"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds >= 9.995 else f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.0009995 else f"{seconds * 1e6:.3g} µs"


def share_text(part: float, whole: float) -> str:
    """Format a share of a whole as a percentage.

    Example:
        >>> share_text(1, 3), share_text(0.001, 3), share_text(0, 3), share_text(1, 0)
        ('33%', 'under 1%', '0%', 'unknown')
    """
    if not whole or not np.isfinite(part):
        return "unknown"
    return "under 1%" if 0 < part < 0.01 * whole else f"{part / whole:.0%}"


def facts(table: RunTable, intervals: TaskIntervals) -> list[Fact]:
    """Return the figures at the top of the report."""
    work = float((intervals.right - intervals.left).sum())
    could = table.wall_seconds * table.n_workers
    counts = table.status_counts()
    by_status = ", ".join(f"{counts[name]:,} {name}" for status in _ORDER if (name := status.name.lower()) in counts)
    began = dt.datetime.fromtimestamp(table.began_at, tz=dt.UTC)
    return [
        Fact("wall time", seconds_text(table.wall_seconds), f"sum of tasks {seconds_text(work)}"),
        Fact("tasks", f"{len(table):,}", by_status),
        Fact("workers", f"{table.n_workers:,}", f"busy {share_text(work, could)} of the time" if could else ""),
        Fact("schedule", table.schedule, _layers_text(table)),
        Fact("CPU time", seconds_text(table.cpu_seconds), "of the workers"),
        Fact("peak memory", as_text(table.peak_rss) if table.peak_rss else "unknown", "of the largest worker"),
        Fact("began", f"{began:%Y-%m-%d}", f"{began:%H:%M:%S} UTC"),
    ]


def _layers_text(table: RunTable) -> str:
    n_layers = int(table.layer.max(initial=-1)) + 1
    barriers = "a barrier between layers" if table.schedule == "layers" else "no barriers"
    return f"{n_layers:,} layer{'s' * (n_layers != 1)}, {barriers}"


def task_lines(table: RunTable, tasks: Iterable[int], whole: float) -> list[TaskLine]:
    """Return rows for tasks; shares are relative to ``whole`` seconds."""
    return [
        TaskLine(
            table.names[task],
            table.callables[table.callable_of[task]],
            int(table.layer[task]),
            seconds_text(float(table.seconds[task])),
            float(table.seconds[task]) / whole if whole else 0.0,
            share_text(float(table.seconds[task]), whole),
        )
        for task in map(int, tasks)
    ]


def path_shown(table: RunTable, path: Sequence[int]) -> list[int]:
    """Return the tasks of the critical path to list, in order; of a long path, those that took longest."""
    if len(path) <= MOST_PATH:
        return list(path)
    places = np.argsort(-table.seconds[np.array(path)], kind="stable")[:MOST_PATH]
    return [path[place] for place in sorted(places.tolist())]


def layers_shown(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Return the layers to draw, in order; of many layers, those with the longest wall times."""
    longest = sorted(rows, key=lambda row: -row.wall_seconds)[:MOST_LAYERS]
    return sorted(longest, key=lambda row: row.layer)


def failure_lines(table: RunTable) -> list[FailureLine]:
    """Return at most `MOST_FAILURES` failed attempts, those that were not retried first."""
    attempts = [*table.failures, *_without_attempt(table)]
    attempts.sort(key=lambda failed: not _is_final(table, failed))
    return [_failure_line(table, failed) for failed in attempts[:MOST_FAILURES]]


def n_failures(table: RunTable) -> int:
    """Return how many attempts failed."""
    return len(table.failures) + len(_without_attempt(table))


def _without_attempt(table: RunTable) -> list[FailedAttempt]:
    """Return a failed attempt for each error of a task that is not among the failed attempts of the run."""
    known = {(failed.task, failed.attempt) for failed in table.failures}
    return [
        FailedAttempt(task, int(table.attempt[task]), float(table.start[task]), float(table.seconds[task]),
                      int(table.worker[task]), error, "")
        for task, error in table.errors.items()
        if (task, int(table.attempt[task])) not in known
    ]  # fmt: skip


def _is_final(table: RunTable, failed: FailedAttempt) -> bool:
    return bool(table.status_of[failed.task] == Status.FAILED and failed.attempt >= table.attempt[failed.task])


def _failure_line(table: RunTable, failed: FailedAttempt) -> FailureLine:
    where = [f"attempt {failed.attempt}"] if failed.attempt > 0 else []
    where += [f"layer {int(table.layer[failed.task])}"]
    where += [f"worker {failed.worker}"] if failed.worker >= 0 else []
    where += [f"after {seconds_text(failed.seconds)}"] if np.isfinite(failed.seconds) else []
    title = failed.error.partition("\n")[0]
    title = title if len(title) <= _MOST_TITLE else title[: _MOST_TITLE - 1] + "…"
    body = failed.traceback or (failed.error if title != failed.error else "")
    return FailureLine(table.names[failed.task], ", ".join(where), title, _cut(body), _is_final(table, failed))


def _cut(text: str) -> str:
    """Cut a long text in the middle."""
    if len(text) <= _MOST_TRACEBACK:
        return text
    half = _MOST_TRACEBACK // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def plan_workers(table: RunTable) -> list[int]:
    """Return the numbers of workers of the forecast: 1, 2, 4 and so on, and the number that the run had."""
    return sorted({*WORKERS, max(table.n_workers, 1)})


def plan_lines(table: RunTable, rows: Sequence[PlanRow]) -> list[PlanLine]:
    """Return the rows of the forecast; speedups are relative to one worker with the schedule "layers"."""
    alone = next((row.layered_seconds for row in rows if row.workers == 1), 0.0)

    def times(seconds: float) -> str:
        return f"{alone / seconds:.1f}\N{MULTIPLICATION SIGN}" if alone and seconds else ""

    return [
        PlanLine(
            row.workers,
            seconds_text(row.layered_seconds),
            times(row.layered_seconds),
            seconds_text(row.eager_seconds),
            times(row.eager_seconds),
            row.workers == table.n_workers,
        )
        for row in rows
    ]


def step_text(steps: StepLine, what: str) -> str:
    """Return a note on how the values of a line over time are aggregated; empty if they are exact."""
    return "" if not steps.step_seconds else f" Each step is the {what} of {seconds_text(steps.step_seconds)}."
