"""The progress of a run: bars on a terminal or in a notebook, plain lines elsewhere.

The loop of the run draws, at most ten times a second and for at most 1 % of the time: a slow drawing delays the next
one. What tasks print goes above the bars.
"""

from __future__ import annotations

import functools
import io
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from forgepar.records.display import Display, FailedTask, RunView
from forgepar.report.progress import notebook, wording
from forgepar.report.progress.figures import Figures, RunMeter
from forgepar.report.progress.plain import PlainProgress
from forgepar.report.progress.terminal import Footer, is_terminal

if TYPE_CHECKING:
    from forgepar.report.progress.bars import Artist

FIRST_SECONDS = 0.2  # a shorter run gets only its last line
LEAST_SECONDS = 0.1  # between two drawings
SHARE = 120  # drawings take 1/120 of the time: 1 %, less the overhead around them
_MOST_SECONDS = 2.0  # the longest delay, after a drawing that was slow because the machine was busy


class Pace:
    """The schedule of drawings: the last one, and all of them, take no more than their share of the time."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._spent = 0.0

    def next_after(self, begin: float, end: float) -> float:
        """Return the time of the next drawing, after one that lasted from begin to end."""
        if self._began is None:
            self._began = begin - FIRST_SECONDS
        self._spent += end - begin
        wanted = max(SHARE * (end - begin), SHARE * self._spent - (end - self._began))
        return end + max(LEAST_SECONDS, min(wanted, _MOST_SECONDS))


class BarProgress:
    """A display of bars below the output of a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.look_at = math.inf
        self._stream = stream
        self._meter = RunMeter()
        self._pace = Pace()
        self._failures = wording.FewFailures()
        self._footer = Footer(stream)
        self._look: Callable[[], RunView] | None = None
        self._artist: Artist | None = None

    def begin(self, look: Callable[[], RunView]) -> None:
        """Start to write what is printed above the bars."""
        self._look = look
        self._footer.open()
        self.look_at = time.perf_counter() + FIRST_SECONDS

    def beat(self, now: float) -> None:
        """Draw the bars if it is time."""
        if now >= self.look_at and self._look is not None:
            self.draw(self._meter.of_view(self._look()))
            self.look_at = self._pace.next_after(now, time.perf_counter())

    def draw(self, figures: Figures) -> None:
        """Draw the bars."""
        from forgepar.report.progress.bars import bars

        columns, lines = self._footer.size
        self._footer.show(self._drawn().frame(bars(figures, columns), columns, lines))

    def failed(self, failure: FailedTask) -> None:
        """Print a failure above the bars."""
        if (text := self._failures.line(failure)) is not None:
            self._footer.take(self._drawn().text(text, "yellow" if failure.goes_on else "red"))

    def close(self) -> None:
        """Replace the bars with a last line."""
        look, self._look, self.look_at = self._look, None, math.inf
        last = ""
        if look is not None:
            with suppress(Exception):  # restoring the terminal matters more
                last = self._last_line(self._meter.of_end(look()))
        self._footer.close(last)

    def _last_line(self, figures: Figures) -> str:
        text = wording.ended(figures)
        if self._artist is None:
            return text + "\n"
        return self._artist.text(text, "red" if figures.n_failed else "green")

    def _drawn(self) -> Artist:
        if self._artist is None:
            from forgepar.report.progress.bars import Artist

            self._artist = Artist(self._stream)
        return self._artist


def progress_display(stream: TextIO | None = None) -> Display:
    """Return the best display for a stream.

    Args:
        stream: the stream; None: the notebook if this process is a kernel, else `sys.stderr`.
    """
    if stream is None and notebook.is_notebook():
        return notebook.NotebookProgress()
    stream = sys.stderr if stream is None else stream
    if is_terminal(stream) and has_rich():
        return BarProgress(stream)
    return PlainProgress(stream)


@functools.cache
def has_rich() -> bool:
    """Return whether rich is installed. Load it and draw once: the first drawing takes longer than many later ones."""
    try:
        from forgepar.report.progress.bars import Artist, bars
    except ImportError:
        return False
    nothing = Figures("", 1, 0, {}, 1, 0, (), 0, math.nan, math.nan, 0.0)
    Artist(io.StringIO()).frame(bars(nothing, 80), 80, 24)
    return True
