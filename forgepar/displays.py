"""Between the loop of a run and whoever shows it as it goes: the loop calls by the clock, the display looks.

    Dispatcher ──> Display.beat      when `look_at` is over
               ──> Display.failed    at once
    Display    ──> look() ──> Look   the run's own columns, nothing copied

The loop knows only this protocol; see `forgepar.report.progress` for the bars. No thread draws: one that wakes while
batches go out would hold them up by as much as 5 ms, the interpreter's switch interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forgepar.plan import IntArray
from forgepar.sinks import report


class RunningTask(NamedTuple):
    """A task that a worker is at.

    Attributes:
        task: its name.
        worker: the slot.
        pid: the worker's process.
        seconds: for how long.
        fraction: how much of its work is done, as it told by `TaskContext.progress`; nan if it did not.
        text: what it is at, as it told.
    """

    task: str
    worker: int
    pid: int
    seconds: float
    fraction: float
    text: str


class Look(NamedTuple):
    """A run as its loop has it at this moment. The columns are the run's own: read them before the loop goes on.

    Attributes:
        workflow: the workflow's name.
        status: (n,) int8, a `forgepar.runstate.Status` a task.
        layer: (n,) int32, that of each task.
        template: (n,) int32, that of each task.
        callable_of: by template, the number of what its tasks call.
        seconds: by that number, the average of what tasks took; nan where none was done.
        by_layers: whether layers wait for each other.
        running: the tasks that workers are at, each behind its number.
        pids: by slot, the worker's process; 0 where there is none.
        bytes_held: what large values take in shared memory, bytes.
        began: when it began, seconds of `time.perf_counter`.
        now: this moment, likewise.
        start: (n,) float64, when each task's last attempt began, likewise; nan: it did not run yet.
    """

    workflow: str
    status: NDArray[np.int8]
    layer: IntArray
    template: IntArray
    callable_of: Sequence[int]
    seconds: Sequence[float]
    by_layers: bool
    running: Sequence[tuple[int, RunningTask]]
    pids: Sequence[int]
    bytes_held: int
    began: float
    now: float
    start: NDArray[np.float64]


class FailedTask(NamedTuple):
    """An attempt of a task that failed.

    Attributes:
        task: the task's name.
        attempt: which.
        error: class and text of what it failed with.
        goes_on: whether something is done about it: another attempt, or its fallback.
    """

    task: str
    attempt: int
    error: str
    goes_on: bool


class Display(Protocol):
    """Shows a run as it goes. All calls come from the thread of the run, and what they raise ends it.

    Attributes:
        look_at: when `beat` is to be called at the latest, `time.perf_counter` seconds; inf: never.
    """

    look_at: float

    def begin(self, look: Callable[[], Look]) -> None:
        """Take note that a run begins; ``look`` tells how it stands, and is called within `beat` and `close` alone."""

    def beat(self, now: float) -> None:
        """Show how the run stands, if it is time for that, and say by `look_at` when it will be next."""

    def failed(self, failure: FailedTask) -> None:
        """Show that a task failed."""

    def close(self) -> None:
        """Take away what is not to stay, however the run ended. May be called twice."""


class Shielded:
    """A display that raises nothing: what the other raises first is told by a warning, and that one is closed.

    Args:
        display: the other.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._owner = os.getpid()
        self.look_at = math.inf
        self._is_off = False

    def begin(self, look: Callable[[], Look]) -> None:
        """Begin, and let it show what there is."""
        self._try(lambda: self._display.begin(look))

    def beat(self, now: float) -> None:
        """Let it show how the run stands, when it wants to."""
        if now >= self.look_at:
            self._try(lambda: self._display.beat(now))

    def failed(self, failure: FailedTask) -> None:
        """Let it show a failure."""
        self._try(lambda: self._display.failed(failure))

    def close(self) -> None:
        """Close it."""
        self._try(self._display.close)
        self.look_at = math.inf

    def _try(self, call: Callable[[], None]) -> None:
        if self._is_off or os.getpid() != self._owner:
            return
        try:
            call()
            self.look_at = self._display.look_at
        except Exception as error:
            if os.getpid() != self._owner:  # it has forked: the display is the parent's
                return
            self._is_off = True
            self.look_at = math.inf
            with suppress(Exception):
                self._display.close()
            report(
                f"the progress display raised {type(error).__name__}: {error}. It is off; the run goes on.",
                logger="forgepar.report",
            )
