"""Progress of a run while it goes: bars on a terminal or in a notebook, plain lines elsewhere.

The loop of the run draws, by the clock: ten times a second at most, and in no more than a hundredth of the time, as
the cost of each drawing puts off the next. What tasks print goes above the bars.
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

from forgepar.displays import Display, FailedTask, Look
from forgepar.report import notebook, wording
from forgepar.report.figures import Figures, Meter
from forgepar.report.plainprogress import PlainProgress
from forgepar.report.terminal import Footer, is_terminal

if TYPE_CHECKING:
    from forgepar.report.bars import Artist

FIRST_SECONDS = 0.2  # a run that is over by then gets its last line only
LEAST_SECONDS = 0.1  # between two drawings
SHARE = 120  # drawings take a 120th of the time: a hundredth, less what there is besides
_MOST_SECONDS = 2.0  # a drawing that was slow by chance, as on a busy machine, puts off the next by no more


class Pace:
    """Says when to draw next, so that drawings take no more than their share of the time: the last, and all of them."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._spent = 0.0

    def next_after(self, begin: float, end: float) -> float:
        """Return when to draw next, given when a drawing began and ended."""
        if self._began is None:
            self._began = begin - FIRST_SECONDS
        self._spent += end - begin
        wanted = max(SHARE * (end - begin), SHARE * self._spent - (end - self._began))
        return end + max(LEAST_SECONDS, min(wanted, _MOST_SECONDS))


class BarProgress:
    """A display of bars at the lower end of a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.look_at = math.inf
        self._stream = stream
        self._meter = Meter()
        self._pace = Pace()
        self._failures = wording.FewFailures()
        self._footer = Footer(stream)
        self._look: Callable[[], Look] | None = None
        self._artist: Artist | None = None

    def begin(self, look: Callable[[], Look]) -> None:
        """Have what is printed from now on go above the bars."""
        self._look = look
        self._footer.open()
        self.look_at = time.perf_counter() + FIRST_SECONDS

    def beat(self, now: float) -> None:
        """Draw the bars, if it is time for that."""
        if now >= self.look_at and self._look is not None:
            self.draw(self._meter.of_look(self._look()))
            self.look_at = self._pace.next_after(now, time.perf_counter())

    def draw(self, figures: Figures) -> None:
        """Draw the bars."""
        from forgepar.report.bars import bars

        columns, lines = self._footer.size
        self._footer.show(self._drawn().frame(bars(figures, columns), columns, lines))

    def failed(self, failure: FailedTask) -> None:
        """Tell of a failure above the bars."""
        if (text := self._failures.line(failure)) is not None:
            self._footer.take(self._drawn().text(text, "yellow" if failure.goes_on else "red"))

    def close(self) -> None:
        """Leave a line in the place of the bars."""
        look, self._look, self.look_at = self._look, None, math.inf
        last = ""
        if look is not None:
            with suppress(Exception):  # what is more important is to give the terminal back
                last = self._last_line(self._meter.of_end(look()))
        self._footer.close(last)

    def _last_line(self, figures: Figures) -> str:
        text = wording.ended(figures)
        if self._artist is None:
            return text + "\n"
        return self._artist.text(text, "red" if figures.n_failed else "green")

    def _drawn(self) -> Artist:
        if self._artist is None:
            from forgepar.report.bars import Artist

            self._artist = Artist(self._stream)
        return self._artist


def progress_display(stream: TextIO | None = None) -> Display:
    """Return what shows progress best on a stream.

    Args:
        stream: which; None: `sys.stderr`, or the notebook that this runs in.
    """
    if stream is None and notebook.is_notebook():
        return notebook.NotebookProgress()
    stream = sys.stderr if stream is None else stream
    if is_terminal(stream) and has_rich():
        return BarProgress(stream)
    return PlainProgress(stream)


@functools.cache
def has_rich() -> bool:
    """Tell whether there is rich, and load it and all that a first drawing needs: that takes longer than many more."""
    try:
        from forgepar.report.bars import Artist, bars
    except ImportError:
        return False
    nothing = Figures("", 1, 0, {}, 1, 0, (), 0, math.nan, math.nan, 0.0)
    Artist(io.StringIO()).frame(bars(nothing, 80), 80, 24)
    return True
