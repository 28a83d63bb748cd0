"""Formats of numbers, times and failures: short, and of nearly constant width."""

from __future__ import annotations

import math

from forgepar.machine import as_text
from forgepar.records.display import FailedTask
from forgepar.report.progress.figures import Figures
from forgepar.system.escaping import escaped_line

_MOST_ERROR = 300  # characters of an error that are shown; the result has all of it
UNKNOWN = "-"
MOST_FAILURES = 20  # failures that get a line each


def as_time(seconds: float) -> str:
    """Format a time: "0:07", "12:30", "3:02:11"; "-" if it is not known.

    Example:
        >>> as_time(7.4), as_time(750), as_time(10931), as_time(float("nan"))
        ('0:07', '12:30', '3:02:11', '-')
    """
    if not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_duration(seconds: float) -> str:
    """Format a duration: "0.35 s", "12.3 s"; from a minute on as `as_time` does.

    Example:
        >>> as_duration(0.3456), as_duration(12.34), as_duration(75)
        ('0.35 s', '12.3 s', '1:15')
    """
    if seconds >= 60 or not math.isfinite(seconds):
        return as_time(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def as_rate(rate: float) -> str:
    """Format a throughput: "5,210 tasks/s", "0.25 tasks/s"; empty if it is not known.

    Example:
        >>> as_rate(5210.4), as_rate(3.14159), as_rate(0.25), as_rate(float("nan"))
        ('5,210 tasks/s', '3.1 tasks/s', '0.25 tasks/s', '')
    """
    if not math.isfinite(rate):
        return ""
    number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
    return f"{number} tasks/s"


def as_percent(fraction: float) -> str:
    """Format a fraction as percent, rounded down: only 1.0 is 100 %.

    Example:
        >>> as_percent(0.999), as_percent(1.0)
        ('99 %', '100 %')
    """
    return f"{math.floor(fraction * 100 + 1e-9)} %"


def counted(n: int, what: str) -> str:
    """Format a number of things: "1 task", "1,200 tasks"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def one_line(text: str, most: int = _MOST_ERROR) -> str:
    """Return the first line of a text, cut to this length, with control characters escaped."""
    line = escaped_line(next((line for line in text.splitlines() if line.strip()), "")).replace("\t", " ")
    return line if len(line) <= most else line[: most - 3] + "..."


def of_failure(failure: FailedTask) -> str:
    """Describe a failed attempt; "continues" means that a retry or a fallback follows."""
    end = ", continues" if failure.goes_on else ""
    return f"{one_line(failure.task)} failed in attempt {failure.attempt}{end}: {one_line(failure.error)}"


class FewFailures:
    """Lines for the first failures only: 100,000 lines would slow down a run."""

    def __init__(self) -> None:
        self._n = 0

    def line(self, failure: FailedTask) -> str | None:
        """Return the line for a failure; None for none."""
        self._n += 1
        if self._n <= MOST_FAILURES:
            return of_failure(failure)
        return "further failures are only counted" if self._n == MOST_FAILURES + 1 else None


def ended(figures: Figures) -> str:
    """Return in one line how a run ended."""
    done = f"{figures.n_done:,} of {counted(figures.n_tasks, 'task')} in {counted(figures.n_layers, 'layer')}"
    counts = [f"{n:,} {status}" for status, n in figures.counts.items() if status != "completed"]
    rate = figures.counts.get("completed", 0) / figures.elapsed_seconds if figures.elapsed_seconds else math.nan
    parts = [done, *counts, as_duration(figures.elapsed_seconds), as_rate(rate)]
    return f"{one_line(figures.workflow)}: {', '.join(part for part in parts if part)}"


def held(n_bytes: int) -> str:
    """Format the bytes that are held; empty for 0."""
    return f"{as_text(n_bytes)} held" if n_bytes else ""
