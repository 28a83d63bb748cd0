"""Progress as plain lines, one every few seconds: for files, pipes and terminals without rich."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from forgepar.records.display import FailedTask, RunView
from forgepar.report.progress import wording
from forgepar.report.progress.figures import Figures, RunMeter

LINE_SECONDS = 5.0  # between two lines
_MOST_SHARE = 100  # lines take at most 1/100 of the time


class PlainProgress:
    """A display that writes lines.

    Args:
        stream: the stream; None: `sys.stderr` at the start of the run.
        seconds: time between two lines.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = LINE_SECONDS) -> None:
        self.look_at = math.inf
        self._stream = stream
        self._seconds = seconds
        self._meter = RunMeter()
        self._look: Callable[[], RunView] | None = None
        self._failures = wording.FewFailures()

    def begin(self, look: Callable[[], RunView]) -> None:
        """Start the clock."""
        self._stream = self._stream or sys.stderr
        self._look = look
        self.look_at = time.perf_counter() + self._seconds

    def beat(self, now: float) -> None:
        """Write a line if it is time."""
        if now >= self.look_at and self._look is not None:
            self._write(line(self._meter.of_view(self._look())))
            after = time.perf_counter()
            self.look_at = after + max(self._seconds, _MOST_SHARE * (after - now))

    def failed(self, failure: FailedTask) -> None:
        """Write a line for a failure, unless there were too many."""
        if (text := self._failures.line(failure)) is not None:
            self._write(text)

    def close(self) -> None:
        """Write the last line."""
        look, self._look, self.look_at = self._look, None, math.inf
        if look is not None:
            self._write(wording.ended(self._meter.of_end(look())))

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(f"forgepar: {text}\n")
        self._stream.flush()


def line(figures: Figures) -> str:
    """Return the figures of a run in one line."""
    done = f"{figures.n_done:,} of {wording.counted(figures.n_tasks, 'task')} ({wording.as_percent(figures.fraction)})"
    parts = [
        f"{wording.one_line(figures.workflow)}: {done}",
        f"{figures.n_layers_done} of {wording.counted(figures.n_layers, 'layer')}",
        f"{figures.n_failed:,} failed" if figures.n_failed else "",
        wording.as_rate(figures.rate),
        f"{wording.as_time(figures.seconds_left)} left" if math.isfinite(figures.seconds_left) else "",
    ]
    return ", ".join(part for part in parts if part)
