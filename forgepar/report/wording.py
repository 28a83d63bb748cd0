"""Numbers, times and failures as people read them: short, and of nearly the same width from one moment to the next."""

from __future__ import annotations

import math

from forgepar.displays import FailedTask
from forgepar.escaping import escaped_line
from forgepar.machine import as_text
from forgepar.report.figures import Figures

_MOST_ERROR = 300  # characters of an error that are shown; all of it is in the result
UNKNOWN = "-"
MOST_FAILURES = 20  # that are told one by one


def as_time(seconds: float) -> str:
    """Write a time: "0:07", "12:30", "3:02:11"; "-" where it is not known.

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
    """Write how long something took: "0.35 s", "12.3 s", then as `as_time` does.

    Example:
        >>> as_duration(0.3456), as_duration(12.34), as_duration(75)
        ('0.35 s', '12.3 s', '1:15')
    """
    if seconds >= 60 or not math.isfinite(seconds):
        return as_time(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def as_rate(rate: float) -> str:
    """Write a throughput: "5,210 tasks/s", "0.25 tasks/s"; empty where it is not known.

    Example:
        >>> as_rate(5210.4), as_rate(3.14159), as_rate(0.25), as_rate(float("nan"))
        ('5,210 tasks/s', '3.1 tasks/s', '0.25 tasks/s', '')
    """
    if not math.isfinite(rate):
        return ""
    number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
    return f"{number} tasks/s"


def as_percent(fraction: float) -> str:
    """Write a share, rounded down: 100 % is all of it.

    Example:
        >>> as_percent(0.999), as_percent(1.0)
        ('99 %', '100 %')
    """
    return f"{math.floor(fraction * 100 + 1e-9)} %"


def counted(n: int, what: str) -> str:
    """Write a number of things: "1 task", "1,200 tasks"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def one_line(text: str, most: int = _MOST_ERROR) -> str:
    """Return the first line of a text, and no more of it than so many characters; nothing in it moves a cursor."""
    line = escaped_line(next((line for line in text.splitlines() if line.strip()), "")).replace("\t", " ")
    return line if len(line) <= most else line[: most - 3] + "..."


def of_failure(failure: FailedTask) -> str:
    """Say that an attempt failed, and whether that is the end of it."""
    end = ", goes on" if failure.goes_on else ""
    return f"{one_line(failure.task)} failed in attempt {failure.attempt}{end}: {one_line(failure.error)}"


class FewFailures:
    """Tells failures one by one, and after a while no more: a run of 100,000 failures would do little else."""

    def __init__(self) -> None:
        self._n = 0

    def line(self, failure: FailedTask) -> str | None:
        """Return what to say of a failure; None for nothing."""
        self._n += 1
        if self._n <= MOST_FAILURES:
            return of_failure(failure)
        return "more failures are only counted from here" if self._n == MOST_FAILURES + 1 else None


def ended(figures: Figures) -> str:
    """Say in a line how a run ended."""
    done = f"{figures.n_done:,} of {counted(figures.n_tasks, 'task')} in {counted(figures.n_layers, 'layer')}"
    counts = [f"{n:,} {status}" for status, n in figures.counts.items() if status != "completed"]
    rate = figures.counts.get("completed", 0) / figures.elapsed_seconds if figures.elapsed_seconds else math.nan
    parts = [done, *counts, as_duration(figures.elapsed_seconds), as_rate(rate)]
    return f"{one_line(figures.workflow)}: {', '.join(part for part in parts if part)}"


def held(n_bytes: int) -> str:
    """Say how much is held; empty for nothing."""
    return f"{as_text(n_bytes)} held" if n_bytes else ""
